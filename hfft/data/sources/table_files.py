"""Tables read: text (CSV, TSV, JSON lines), Parquet, what `save_to_disk` wrote, the Hub, and data in memory."""

import csv
import glob
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from hfft.data.sources.advice import looked_for, missing_source, refuse_unused
from hfft.data.sources.folders import files_by_split
from hfft.data.sources.table import RawRows, Table, make_table
from hfft.errors import DataError, first_line
from hfft.recipe.spec import DataSpec
from hfft.system.files import expanded
from hfft.system.hub_lookup import hub_problem

TEXT_TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}
TABLES = (*TEXT_TABLES, ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # files of `save_to_disk`
_MOST_COLUMNS = 1500  # of a text table: each costs milliseconds in datasets


def read_table_file(file: Path) -> Dataset:
    """A table of any kind. In CSV every value is text, so that a class may be called `NA` or `007`; empty is nothing.

    Raises:
        DataError: If it can't be read; with the line, where there is one.
    """
    ending = file.suffix.lower()
    if ending not in TEXT_TABLES:
        return _load_parquet(str(file), {"train": [file]})["train"]
    separator, text = TEXT_TABLES[ending], _text_of(file)
    return _json_lines(text, file) if separator is None else _delimited(text, file, separator)


# What the library `datasets` reads


def read_memory(data: DatasetDict, spec: DataSpec) -> Table:
    """Data in memory, without its format or transform."""
    return _table(data, spec, name="data")


def read_hub(spec: DataSpec) -> Table:
    """A data set of the Hub."""
    missing = missing_source(spec.source)
    if missing is not None:
        raise DataError(f"data.source: {missing}")
    looked = f"{spec.source} is no folder or file here ({looked_for(Path(expanded(spec.source)))})"
    problem = hub_problem(spec.source, "dataset", spec.revision)
    if problem is not None:
        raise DataError(f"data.source: {looked}, and {problem}")
    try:
        loaded = _load(spec.source, spec.source, spec.config, revision=spec.revision)
    except DataError as error:
        raise DataError(f"{error}; {looked}") from error
    return _table(loaded, spec)


def read_saved(folder: Path, spec: DataSpec) -> Table:
    """What `save_to_disk` wrote."""
    refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a saved data set")
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and the file system raise their own
        raise DataError(f"data.source: {spec.source} can't be loaded as a saved data set: {_reason(error)}") from error
    return _table(loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded}), spec)


def read_parquet_folder(folder: Path, files: Sequence[Path], spec: DataSpec) -> Table:
    """Parquet files as the folder's card describes them, else in splits that their names tell."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    if not re.search(r"^(configs|dataset_info):", text, re.MULTILINE):
        return replace(_table(_load_parquet(spec.source, files_by_split(folder, files)), spec), shards=len(files))
    if spec.config is None:
        _check_numbering(spec.source, files)
    return _table(_load(spec.source, str(folder), spec.config), spec)


def _table(splits: Mapping[Any, Dataset], spec: DataSpec, name: str | None = None) -> Table:
    return make_table({str(split): RawRows(rows.with_format(None)) for split, rows in splits.items()}, spec, name=name)


def _load(where: str, path: str, config: str | None = None, **options: Any) -> DatasetDict:
    """A data set of a folder, of the Hub, or of files by split; `options` are those of `load_dataset`."""
    try:
        loaded = load_dataset(path, config, **options)
    except Exception as error:  # datasets 5.2 wraps errors in rows alone; YAML, tar, HDF5, ... raise their own before
        raise DataError(f"data.source: {where} can't be loaded as a data set: {_reason(error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _reason(error: Exception) -> str:
    """The first line that says anything; the first of a DatasetGenerationError doesn't, but the rest and its cause."""
    if isinstance(error, DatasetGenerationError):
        error = DatasetGenerationError("\n".join([*str(error).splitlines()[1:], str(error.__cause__ or "")]))
    return first_line(error)


def _load_parquet(where: str, files: Mapping[str, Sequence[Path]]) -> DatasetDict:
    """Parquet files by split; of which datasets would read all with the class numbers of the first."""
    kinds = [kind for paths in files.values() if (kind := _check_numbering(where, paths))]
    named = {split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()}
    if all(kind == kinds[0] for kind in kinds):
        return _load(where, "parquet", data_files=named)
    return DatasetDict({split: _load(where, "parquet", data_files={split: named[split]})[split] for split in named})


def _check_numbering(where: str, files: Sequence[Path]) -> dict[str, Any]:
    """The class columns of Parquet files that are read as one; refuses other classes in one file than in another."""
    kinds = [(file, kind) for file in files if (kind := _class_columns(file))]
    for file, kind in kinds:
        if kind != kinds[0][1]:
            raise DataError(
                f"data.source: {where}: {kinds[0][0].name} and {file.name} number their classes differently; write "
                "both with one list of names"
            )
    return kinds[0][1] if kinds else {}


def _class_columns(file: Path) -> dict[str, Any]:
    """The columns of a Parquet file whose numbers are classes, with the names of these."""
    try:
        features = Features.from_arrow_schema(pq.read_schema(file))
    except (OSError, ValueError, TypeError, NotImplementedError):  # which loading reports
        return {}
    return {name: kind for name, kind in features.items() if isinstance(getattr(kind, "feature", kind), ClassLabel)}


# Text


def _text_of(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}: line {line} is no UTF-8 text; save the file in that encoding") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{file}: the file is empty")
    before, nul, _ = text.partition("\0")
    if nul:
        line = before.count("\n") + 1
        raise DataError(f"{file}: line {line} holds a NUL character; save the file as UTF-8, if it isn't damaged")
    return text


def _delimited(text: str, file: Path, separator: str) -> Dataset:
    """Rows that have the fields of the header; fields without a name may be missing, and empty ones more than that."""
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
    most, least = len(names), max((place for place, name in enumerate(first, start=1) if name.strip()), default=0)
    for line, fields in records:
        if len(fields) < least or any(field.strip() for field in fields[most:]):
            raise DataError(
                f"{file}: line {line}: found {len(fields)} fields, and {most} in the header; a value that holds "
                f'{separator!r} needs quotes: "..."'
            )
        fields += [""] * (most - len(fields))
    columns = {name: [fields[place] or None for _, fields in records] for place, name in enumerate(names)}
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
    try:
        list(csv.reader(lines, form, strict=len(lines) > 1))
    except csv.Error:
        return False
    return len(list(csv.reader([*lines, "next"], form))) == 2


def _check_names(names: Sequence[str], where: Path | str) -> None:
    if len(names) > _MOST_COLUMNS:
        raise DataError(f"{where}: found {len(names):,} columns; allowed: {_MOST_COLUMNS:,}")
    odd = next((name for name in names if "\0" in name), None)  # where Arrow's name would end
    if odd is not None:
        raise DataError(f"{where}: the column {odd!r} has a NUL character in its name")


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
    return dataset_of(rows, str(file))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of an object, of which JSON would keep the last value of each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def dataset_of(rows: Sequence[Mapping[str, Any]], where: str) -> Dataset:
    """Rows of values of any type, one type in a column, as a data set; what a row lacks is None."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    _check_names(names, where)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds {error.object!a}, and half of a Unicode pair is no text") from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: a column holds values of different types: {first_line(error)}") from error
