"""What a reader makes of a source: a table by split, with the columns that it is used by. Next come its rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, Value

from hfft.data.sources.columns import TableColumns, choose_columns, is_label_name, normalized_name, split_values
from hfft.data.sources.folders import CLASS_FOLDER, divide, folders_of, split_in, split_names
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import inform, warn
from hfft.system.text import printable


@dataclass(frozen=True)
class RawRows:
    """Rows with any columns."""

    rows: Dataset
    base: Path | None = None  # that paths begin at; None where images are in the table itself
    depth: int = 0  # folders that the names of all images begin with and that tell no class: that of the split
    names: str | None = None  # column with the names of images; paths are then absolute, or parts of tar files


@dataclass(frozen=True)
class Table:
    """What a reader found in a source."""

    name: str  # in messages
    splits: dict[str, RawRows]  # by the source's own names
    columns: TableColumns
    root: Path | None = None  # that files are named below; None where images are in the table
    description: str = ""  # the columns in words; empty for class folders
    empty: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by split, class folders without an image
    shards: int = 0  # tar files, or Parquet files of a folder, that hold the images; 0 for other sources


def make_table(
    splits: dict[str, RawRows],
    spec: DataSpec,
    *,
    name: str | None = None,
    root: Path | None = None,
    columns: TableColumns | None = None,
) -> Table:
    """Rows by split, or in one table that a column or folders divide, as a table.

    Columns are chosen where none are given. `root` is that of the `Table`; its name is `spec.source` when None.
    """
    name = spec.source if name is None else name
    if not splits:
        raise DataError(f"{name}: holds no splits")
    first = next(
        (raw for split, raw in splits.items() if split_in(split) == "train"), next(iter(splits.values()))
    ).rows
    columns = columns or choose_columns(first, spec, name, of_files=root is not None)
    if len(splits) > 1:
        _check_split_column(splits, columns.split, spec, name)
        columns = replace(columns, split=None)
    _report_columns(columns, first, spec, name)
    splits = _divided(_with_labels(splits, first.column_names, columns, name), columns, name)
    splits = {printable(split): raw for split, raw in splits.items()}
    return Table(name, splits, columns, root, description=columns.described())


def _check_split_column(splits: Mapping[str, RawRows], column: str | None, spec: DataSpec, where: str) -> None:
    """Tables of one split each need no column of splits, and must not name another split in one."""
    if spec.split_column is not None:
        raise DataError(f"{where}: data.split_column: there are splits already ({', '.join(splits)}); leave it out")
    for split, raw in splits.items():
        if column is None or column not in raw.rows.column_names or split_in(split) is None:
            continue
        named = _by_column(raw.rows, column, where)
        odd = next((name for name in named if split_in(name) not in (None, split_in(split))), None)
        if odd is None:
            continue
        problem = f"{where}: the table of the split {split!r} holds rows of {odd!r} in its column {column!r}"
        if raw.base is not None:
            raise DataError(f"{problem}; name one table (data.source), or rename the column")
        warn(f"{problem}, which is not used")


def _report_columns(columns: TableColumns, rows: Dataset, spec: DataSpec, where: str) -> None:
    """Log which columns were found by their values, whatever their names, and which are not used."""
    for reason in columns.unused:
        warn(f"{where}: {reason}")
    label = columns.label
    is_plain = isinstance(label, str) and isinstance(rows.features.get(label), Value) and label != CLASS_FOLDER
    if spec.label_column is None and is_plain and not is_label_name(str(label)):
        warn(f"{where}: takes the labels from {label!r}, whose values alone repeat; data.label_column names another")
    if spec.split_column is None and columns.split is not None and normalized_name(columns.split) != "split":
        inform(f"{where}: takes the splits from the column {columns.split!r}")


def _with_labels(
    splits: dict[str, RawRows], known: Collection[str], columns: TableColumns, where: str
) -> dict[str, RawRows]:
    """The splits that have the columns that are used; one that lacks nothing but labels is left out with a warning."""
    kept = {}
    for split, raw in splits.items():
        own = raw.rows.column_names
        lacking = columns.required - set(own)
        if not lacking:
            kept[split] = raw
        elif lacking <= set(columns.labels) and set(own) <= set(known):
            warn(f"{where}: left out {split!r}, whose {len(raw.rows):,} rows have no labels")
        else:
            raise DataError(f"{where}: split {split!r} has other columns: {', '.join(own)}")
    return kept


def _divided(splits: dict[str, RawRows], columns: TableColumns, where: str) -> dict[str, RawRows]:
    """Divide a single table by its column of splits, or by the split folders that its paths begin with."""
    if len(splits) > 1:
        return splits
    (raw,) = splits.values()
    if columns.split is not None:
        return {name: replace(raw, rows=rows) for name, rows in _by_column(raw.rows, columns.split, where).items()}
    has_folders = columns.has_paths and raw.names is None and not raw.depth
    divided = divide(list(map(folders_of, raw.rows[columns.image][:]))) if has_folders else None
    if divided is None:
        return splits
    return {name: replace(raw, rows=rows, depth=1) for name, rows in _grouped(raw.rows, divided[0]).items()}


def _by_column(rows: Dataset, column: str, where: str) -> dict[str, Dataset]:
    """Rows by the values of a column, as text, whatever its case and spaces."""
    values = split_values(rows, column)
    if None in values:
        raise DataError(
            f"{where}: split_column: the column {column!r} holds nothing in {values.count(None)} of {len(values)} "
            f"rows, the first is row {values.index(None)}; fill them in, or rename the column"
        )
    known = split_names(map(str, values))
    names: dict[str, str] = {}
    splits = [names.setdefault(name.lower(), name) for name in (known.get(value, value) for value in map(str, values))]
    return _grouped(rows, splits)


def _grouped(rows: Dataset, splits: list[str]) -> dict[str, Dataset]:
    """The rows of each split."""
    places: dict[str, list[int]] = {}
    for place, split in enumerate(splits):
        places.setdefault(split, []).append(place)
    return {split: rows.select(numbers) for split, numbers in places.items()}
