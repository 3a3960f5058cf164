"""Predictions -> JSON lines, CSV or Parquet: on a stream as they come, in a file whole or not at all."""

import codecs
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from hfft.errors import DataError, HfftError
from hfft.inference.classifier import Prediction
from hfft.inference.reading import Skipped
from hfft.system.files import write_file

_BY_ENDING = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_ROWS = 1024  # in one piece of a Parquet file


class SkippedError(DataError):
    """Images that were left out when everything else was done."""

    exit_code = 1


class WritingError(HfftError):
    """A file that can't be written when everything else is done."""

    exit_code = 1


class Kept:
    """The predictions in a stream; what was skipped is noted."""

    def __init__(self, answers: Iterable[Prediction | Skipped]) -> None:
        """Wrap what `Classifier.predict` gives."""
        self._answers = answers
        self._skipped: list[Skipped] = []
        self._images = 0

    def __iter__(self) -> Iterator[Prediction]:
        """The predictions, in their order."""
        for answer in self._answers:
            self._images += 1
            if isinstance(answer, Skipped):
                self._skipped.append(answer)
            else:
                yield answer

    def raise_for_skipped(self) -> None:
        """Raise one error that lists all that was skipped so far, if anything was.

        Raises:
            SkippedError: If so.
        """
        if self._skipped:
            lines = [f"  {one.file}: {one.reason}" for one in self._skipped]
            count = f"skipped {len(self._skipped):,} of {self._images:,} images, which can't be read:"
            raise SkippedError("\n".join([count, *lines]))


def choose_format(asked: str | None, file: Path | None) -> str:
    """`table`, `jsonl`, `csv` or `parquet`: as asked, else as the file's ending tells, else a table.

    Raises:
        DataError: If the ending tells nothing, or the format doesn't go there.
    """
    if file is None:
        if asked == "parquet":
            raise DataError("--format parquet: needs a file; add --output FILE")
        return asked or "table"
    _check_place(file)
    found = asked or _BY_ENDING.get(file.suffix.lower())
    if found is None:
        raise DataError(f"--output {file}: the ending tells no format; allowed: {', '.join(_BY_ENDING)}, or --format")
    if found == "table":
        raise DataError(f"--format table: is for the screen; allowed in a file: {', '.join(_BY_ENDING.values())}")
    return found


def save_predictions(
    predictions: Iterable[Prediction], file: Path, form: str, classes: Sequence[str], *, is_multi_label: bool = False
) -> None:
    """Write a file, whole or not at all.

    Args:
        predictions: For CSV and Parquet, with all classes in `top`.
        file: Replaced if it exists.
        form: `jsonl`, `csv` or `parquet`.
        classes: Class names, in the order of the columns.
        is_multi_label: Whether the predictions have `labels`.

    Raises:
        WritingError: If it can't be written.
    """

    def write(aside: Path) -> None:
        if form == "parquet":
            _write_parquet(predictions, aside, classes, is_multi_label=is_multi_label)
            return
        with aside.open("w", encoding="utf-8", newline="") as stream:
            write_lines(predictions, stream, form, classes, is_multi_label=is_multi_label)

    _write(file, write)


def write_lines(
    predictions: Iterable[Prediction],
    stream: TextIO,
    form: str,
    classes: Sequence[str],
    *,
    is_multi_label: bool = False,
) -> None:
    """Write each prediction as soon as it is there.

    JSON lines have the fields of `Prediction`, those that weren't asked for left out; CSV has a header and the columns
    of a run's predictions.parquet that need no true label; several labels are a list as JSON has it.

    Args:
        predictions: For CSV, with all classes in `top`.
        stream: Is flushed after each line.
        form: `jsonl` or `csv`.
        classes: Class names, in the order of the columns.
        is_multi_label: Whether the predictions have `labels`.
    """
    is_utf8 = codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name == "utf-8"
    if form == "jsonl":
        for prediction in predictions:
            fields = {name: value for name, value in dataclasses.asdict(prediction).items() if value is not None}
            stream.write(json.dumps(fields, ensure_ascii=not is_utf8) + "\n")  # escapes of JSON's own
            stream.flush()
        return
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(_columns(classes, is_multi_label=is_multi_label))
    for prediction in predictions:
        file, label, *probabilities = _row(prediction, classes)
        label = json.dumps(label, ensure_ascii=not is_utf8) if is_multi_label else label
        rows.writerow([file, label, *(f"{value:.9g}" for value in probabilities)])  # all digits that a float32 has
        stream.flush()


def check_table_file(file: Path) -> None:
    """Find out before any work whether `save_table` can write there.

    Raises:
        DataError: If it can't.
    """
    _check_place(file)
    if file.suffix.lower() != ".parquet":
        raise DataError(f"--output {file}: allowed: a name that ends in .parquet")


def save_table(table: Any, file: Path) -> None:
    """Write a pandas table as Parquet, whole or not at all.

    Args:
        table: As `Scores.table` makes it.
        file: Replaced if it exists.

    Raises:
        WritingError: If it can't be written.
    """
    _write(file, lambda aside: table.to_parquet(aside, index=False))


def _check_place(file: Path) -> None:
    folder = file.absolute().parent
    if file.is_dir():
        raise DataError(f"--output {file}: is a folder; give the name of a file")
    if not folder.is_dir():
        raise DataError(f"--output {file}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise DataError(f"--output {file}: no file can be made in {folder}")


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    try:
        write_file(file, write)
    except OSError as error:
        raise WritingError(f"--output {file}: can't be written: {error.strerror or error}") from error


def _write_parquet(
    predictions: Iterable[Prediction], file: Path, classes: Sequence[str], *, is_multi_label: bool
) -> None:
    import pyarrow as pa  # which the other formats don't need
    from pyarrow import parquet

    remaining = iter(predictions)
    file_name, label, *numbers = _columns(classes, is_multi_label=is_multi_label)
    kinds = [(file_name, pa.string()), (label, pa.list_(pa.string()) if is_multi_label else pa.string())]
    schema = pa.schema([*kinds, *((name, pa.float32()) for name in numbers)])
    with parquet.ParquetWriter(file, schema) as writer:
        while piece := list(islice(remaining, _ROWS)):
            columns = zip(*(_row(prediction, classes) for prediction in piece), strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))


def _columns(classes: Sequence[str], *, is_multi_label: bool = False) -> list[str]:
    best = [] if is_multi_label else ["probability"]  # which of several labels would have
    return ["file", "prediction", *best, *(f"probability {name}" for name in classes)]


def _row(prediction: Prediction, classes: Sequence[str]) -> list[Any]:
    if prediction.labels is not None:
        given = [name for name in classes if name in prediction.labels]  # in the order of the columns
        return [prediction.file, given, *(prediction.top[name] for name in classes)]
    return [
        prediction.file,
        prediction.label,
        prediction.probability,
        *(prediction.top[name] for name in classes),
    ]
