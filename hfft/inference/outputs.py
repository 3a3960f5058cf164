"""What commands write where users say: checked before any work, whole or not at all; predictions in any form."""

import codecs
import csv
import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from hfft.errors import DataError, HfftError
from hfft.inference.classifier import Prediction
from hfft.inference.reading import Skipped
from hfft.system.files import write_file, write_folder

_FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_ROWS = 1024  # of one row group of a Parquet file
_OWN_IMPORT = re.compile(r"^from (hfft[\w.]*) import .+\n", re.MULTILINE)


class WritingError(HfftError):
    """A file or folder that can't be written when everything else is done."""

    exit_code = 1


def check_output_file(file: Path, option: str = "--output", endings: Collection[str] = ()) -> None:
    """Check that a file can be written, and has one of the endings, if any are given; DataError if not."""
    where, folder = f"{option} {file}", file.absolute().parent
    if file.is_dir():
        raise DataError(f"{where}: is a folder; give the name of a file")
    if not folder.is_dir():
        raise DataError(f"{where}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise DataError(f"{where}: no file can be made in {folder}")
    if endings and file.suffix.lower() not in endings:
        raise DataError(f"{where}: allowed: a name that ends in {' or '.join(endings)}")


def check_output_folder(folder: Path, option: str, own_files: Collection[str], *, overwrite: bool) -> Path:
    """Resolve a folder, and check that it can be written or replaced without the loss of anybody else's files.

    `own_files` are patterns of all files that the command ever writes into such a folder, `option` is that of the
    command line.

    Raises:
        DataError: If it can't.
    """
    where, folder = f"{option} {folder}", folder.resolve()
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise DataError(f"{where}: is the folder that you are in, or holds it; give another one")
    if folder.is_dir():
        foreign = (name for name in _files_in(folder) if not any(fnmatch(name, own) for own in own_files))
        others = sorted(islice(foreign, 3))
        if others:
            raise DataError(f"{where}: holds {', '.join(others)}, which would be lost; give another folder")
        if any(folder.iterdir()) and not overwrite:
            raise DataError(f"{where}: is there already; --overwrite replaces it")
    elif folder.exists():
        raise DataError(f"{where}: is a file; give the name of a folder")
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(f"{where}: no folder can be made in {parent}")
    return folder


def _files_in(folder: Path) -> Iterator[str]:
    """Files and links at any depth."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def write_output_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file of `--output` at a temporary path, then put it in place; WritingError if it can't."""
    _write(f"--output {file}", lambda: write_file(file, write))


def write_output_folder(folder: Path, option: str, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary folder, then put it in place of the old one; WritingError if it can't."""
    _write(f"{option} {folder}", lambda: write_folder(folder, write))


def _write(where: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise WritingError(f"{where}: can't be written: {error.strerror or error}") from error


def source_without_hfft(module: ModuleType) -> str:
    """The module's source, with the source of each hfft module that it imports in the place of the import."""
    return _OWN_IMPORT.sub(
        lambda found: source_without_hfft(importlib.import_module(found[1])), inspect.getsource(module)
    )


class SkippedError(DataError):
    """Images that were skipped, raised when everything else is done."""

    exit_code = 1


class WithoutSkipped:
    """The predictions among the results of `Classifier.predict`; keeps the skipped images and counts all."""

    def __init__(self, results: Iterable[Prediction | Skipped]) -> None:
        """Wrap the results."""
        self._results = results
        self._skipped: list[Skipped] = []
        self._images = 0

    def __iter__(self) -> Iterator[Prediction]:
        """The predictions, in their order."""
        for result in self._results:
            self._images += 1
            if isinstance(result, Skipped):
                self._skipped.append(result)
            else:
                yield result

    def raise_for_skipped(self) -> None:
        """Raise one SkippedError that lists all images that were skipped so far, if there are any."""
        if self._skipped:
            lines = [f"\n  {one.file}: {one.reason}" for one in self._skipped]
            count = f"skipped {len(lines):,} of {self._images:,} images, which can't be read:"
            raise SkippedError(count + "".join(lines))


@dataclass(frozen=True)
class Columns:
    """The columns of CSV and Parquet: those of a run's predictions.parquet that need no true label."""

    classes: Sequence[str]  # in the order of their columns
    is_multi_label: bool = False

    @property
    def names(self) -> list[str]:
        """Their headers."""
        best = [] if self.is_multi_label else ["probability"]
        return ["file", "prediction", *best, *(f"probability {name}" for name in self.classes)]

    def row(self, prediction: Prediction) -> list[Any]:
        """The values of a prediction with all classes in `top`."""
        probabilities = [prediction.top[name] for name in self.classes]
        if prediction.labels is None:
            return [prediction.file, prediction.label, prediction.probability, *probabilities]
        return [prediction.file, [name for name in self.classes if name in prediction.labels], *probabilities]


def choose_format(asked: str | None, file: Path | None) -> str:
    """`table`, `jsonl`, `csv` or `parquet`: as asked, else by the file's ending, else a table.

    Raises:
        DataError: If the ending is unknown, the format isn't possible there, or the file can't be written.
    """
    if file is None:
        if asked == "parquet":
            raise DataError("--format parquet: needs a file; add --output FILE")
        return asked or "table"
    check_output_file(file)
    found = asked or _FORMATS.get(file.suffix.lower())
    if found is None:
        raise DataError(f"--output {file}: the ending tells no format; allowed: {', '.join(_FORMATS)}, or --format")
    if found == "table":
        raise DataError(f"--format table: is for the screen; allowed in a file: {', '.join(_FORMATS.values())}")
    return found


def save_predictions(predictions: Iterable[Prediction], file: Path, form: str, columns: Columns) -> None:
    """Write or replace a file of the form `jsonl`, `csv` or `parquet`; WritingError if it can't be.

    CSV and Parquet need all classes in `top`.
    """

    def write(path: Path) -> None:
        if form == "parquet":
            _write_parquet(predictions, path, columns)
            return
        with path.open("w", encoding="utf-8", newline="") as stream:
            write_lines(predictions, stream, form, columns)

    write_output_file(file, write)


def write_lines(predictions: Iterable[Prediction], stream: TextIO, form: str, columns: Columns) -> None:
    """Write and flush each prediction as it comes, in the form `jsonl` or `csv`.

    JSON lines have the fields of `Prediction` that aren't None. CSV has a header, needs all classes in `top`, and
    holds several labels as a JSON list. JSON is ASCII unless the stream's encoding is UTF-8.
    """
    is_ascii = codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name != "utf-8"
    if form == "jsonl":
        for prediction in predictions:
            fields = {name: value for name, value in dataclasses.asdict(prediction).items() if value is not None}
            stream.write(json.dumps(fields, ensure_ascii=is_ascii) + "\n")
            stream.flush()
        return
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(columns.names)
    for prediction in predictions:
        file, label, *probabilities = columns.row(prediction)
        label = json.dumps(label, ensure_ascii=is_ascii) if columns.is_multi_label else label
        rows.writerow([file, label, *(f"{value:.9g}" for value in probabilities)])  # all digits of a float32
        stream.flush()


def _write_parquet(predictions: Iterable[Prediction], file: Path, columns: Columns) -> None:
    import pyarrow as pa  # which the other formats don't need
    from pyarrow import parquet

    label = pa.list_(pa.string()) if columns.is_multi_label else pa.string()
    kinds = [pa.string(), label, *[pa.float32()] * (len(columns.names) - 2)]
    schema, remaining = pa.schema(list(zip(columns.names, kinds, strict=True))), iter(predictions)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(remaining, _ROWS)):
            values = zip(*map(columns.row, group), strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(values, kinds, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
