"""Predictions -> JSON lines, CSV or Parquet: in a stream as they come, in a file whole or not at all."""

import codecs
import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from hfft.errors import DataError
from hfft.inference.classifier import Prediction
from hfft.inference.outputs import check_output_file, write_output_file
from hfft.inference.reading import Skipped

_FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_ROWS = 1024  # of one row group of a Parquet file


class SkippedError(DataError):
    """Images that were skipped, raised when everything else is done."""

    exit_code = 1


class WithoutSkipped:
    """The predictions among the results of `Classifier.predict`; keeps count of the skipped images."""

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
            lines = [f"  {one.file}: {one.reason}" for one in self._skipped]
            count = f"skipped {len(self._skipped):,} of {self._images:,} images, which can't be read:"
            raise SkippedError("\n".join([count, *lines]))


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

    remaining = iter(predictions)
    label = pa.list_(pa.string()) if columns.is_multi_label else pa.string()
    file_name, label_name, *numbers = columns.names
    fields = [(file_name, pa.string()), (label_name, label), *((name, pa.float32()) for name in numbers)]
    schema = pa.schema(fields)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(remaining, _ROWS)):
            values = zip(*map(columns.row, group), strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
