"""Tables of text, CSV, TSV and JSON lines, as data sets: every row has the fields of the header, or is named."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value

from hfft.errors import DataError, first_line

TEXT_TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}
_MOST_COLUMNS = 1500  # of a text table: each costs milliseconds in datasets


def read_text_table(file: Path) -> Dataset:
    """A table of text rows. In CSV every value is text, so that a class may be called `NA` or `007`; empty is nothing.

    Raises:
        DataError: If it can't be read; with the line, where there is one.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}: line {line} is no UTF-8 text; save the file in that encoding") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{file}: the file is empty")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"{file}: line {line} holds a NUL character, which no UTF-8 text has; save the file in that encoding, if "
            "it isn't damaged"
        )
    separator = TEXT_TABLES[file.suffix.lower()]
    return _json_lines(text, file) if separator is None else _delimited(text, file, separator)


def _delimited(text: str, file: Path, separator: str) -> Dataset:
    header = text.lstrip().splitlines()[0]
    if separator == ",":  # or a semicolon, as spreadsheets write it in countries with decimal commas, a tab, a bar
        separator = max((separator, ";", "\t", "|"), key=header.count)
    form = csv.excel()
    form.delimiter = separator
    form.skipinitialspace = re.search(rf'{re.escape(separator)} +"', text) is not None  # a, "b, c"
    (_, first), *records = _records(text, file, form)
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(first)]
    _check_names(names, file)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: two columns have the same name: {', '.join(twice)}; rename one")
    if not records:
        raise DataError(f"{file}: the file holds a header and no rows")
    least = max((place for place, name in enumerate(first, start=1) if name.strip()), default=0)
    rows = [
        _fields(fields, least, len(names), separator=separator, where=f"{file}: line {line}")
        for line, fields in records
    ]
    columns = {name: [row[place] or None for row in rows] for place, name in enumerate(names)}
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, Value("string"))))


def _records(text: str, file: Path, form: csv.Dialect) -> Iterator[tuple[int, list[str]]]:
    """The line that each record begins in, and its fields; blank lines are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = list(io.StringIO(text, newline=""))  # which ends them at \n, \r and \r\n, and nowhere else
    reader, begin = csv.reader(lines, form), 1
    for fields in reader:
        own = lines[begin - 1 : reader.line_num]
        if (len(own) > 1 or reader.line_num == len(lines)) and not _is_closed(own, form):
            raise DataError(f"{file}: line {begin}: a quote is opened and not closed; write a quote itself as two")
        if len(fields) > 1 or "".join(fields).strip():
            yield begin, fields
        begin = reader.line_num + 1


def _is_closed(lines: Sequence[str], form: csv.Dialect) -> bool:
    """Whether lines are one record whose last quote ends a field, so that it hasn't run into another record's."""
    if len(lines) > 1:
        try:
            list(csv.reader(lines, form, strict=True))
        except csv.Error:
            return False
    return len(list(csv.reader([*lines, "next"], form))) == 2


def _fields(fields: list[str], least: int, most: int, *, separator: str, where: str) -> list[str]:
    """As many fields as the header has; those without a name may be missing, and empty ones more than that."""
    if len(fields) < least or any(field.strip() for field in fields[most:]):
        raise DataError(
            f"{where}: found {len(fields)} fields, and {most} in the header; a value that holds {separator!r} needs "
            'quotes: "..."'
        )
    return [*fields[:most], *[""] * (most - len(fields))]


def _check_names(names: Sequence[str], file: Path) -> None:
    if len(names) > _MOST_COLUMNS:
        raise DataError(f"{file}: found {len(names):,} columns; allowed: {_MOST_COLUMNS:,}")
    for name in names:
        if "\0" in name:  # where Arrow's name would end
            raise DataError(f"{file}: the column {name!r} has a NUL character in its name")


def _json_lines(text: str, file: Path) -> Dataset:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):  # JSON may hold other line breaks
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}: line {number} holds {type(row).__name__}; allowed: an object per line")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    _check_names(names, file)
    return dataset_of({name: [row.get(name) for row in rows] for name in names}, str(file))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of an object, of which JSON would keep the last value of each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def dataset_of(columns: dict[str, list[Any]], where: str) -> Dataset:
    """Columns of values of any type as a data set.

    Raises:
        DataError: If the values of a column are of several types, or a text is none that can be kept.
    """
    try:
        return Dataset.from_dict(columns)
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds {error.object!a}, and half of a Unicode pair is no text") from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: a column holds values of different types: {first_line(error)}") from error
