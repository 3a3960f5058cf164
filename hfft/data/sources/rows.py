"""A table -> rows as the rest of hfft takes them: an image not decoded, a label, a name."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hfft.data.images.decoding import shown_path, stored_path
from hfft.data.sources.columns import PARENT_FOLDER
from hfft.data.sources.folders import CLASS_FOLDER
from hfft.data.sources.label_values import read_labels, read_weights
from hfft.data.sources.labels import SOFT_LABELS, WEIGHT, label_text, same_class
from hfft.data.sources.table import RawRows, Table
from hfft.errors import DataError
from hfft.system.files import expanded
from hfft.system.text import path_text


@dataclass(frozen=True)
class Source:
    """What a source holds; a filter of rows stands between this and the splits of a run.

    Rows have `image` (`bytes` and `path`), `label` (-1 for none; multi-label, a list, or None for none), `file` and,
    where groups were asked for, `group`. Other fields are as those of `Table`.
    """

    name: str
    splits: dict[str, Dataset]
    columns: str = ""
    empty: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shards: int = 0

    def without(self, files: Collection[str]) -> "Source":
        """The same without the rows of these names."""
        if not files:
            return self
        return replace(self, splits={split: without_files(rows, files) for split, rows in self.splits.items()})


def without_files(rows: Dataset, files: Collection[str]) -> Dataset:
    """The rows that don't have these names, in order."""
    left_out = set(files)
    kept = [place for place, file in enumerate(rows["file"][:]) if file not in left_out]
    return rows if len(kept) == len(rows) else rows.select(kept)


def row_features(names: Sequence[str]) -> Features:
    """The types of the columns that every row has."""
    return Features({"image": Image(decode=False), "label": ClassLabel(names=list(names)), "file": Value("string")})


def make_rows(table: Table, task: str) -> Source:
    """Give a table our columns and one list of class names; `task` is that of `DataSpec`."""
    where, columns = table.name, table.columns
    paths = {split: _paths(raw, table) for split, raw in table.splits.items()}
    files = {split: _files(raw, split, paths[split]) for split, raw in table.splits.items()}
    labelled = read_labels(table, files, task)
    splits = {}
    for split, raw in table.splits.items():
        rows = _images(raw.rows, columns.image, paths[split], where)
        rows = rows.add_column("label", labelled.labels[split], feature=labelled.feature)
        rows = rows.add_column("file", files[split], feature=Value("string"))
        if labelled.soft is not None:
            kind = List(Value("float32"), length=labelled.soft[split].shape[1])
            rows = rows.add_column(SOFT_LABELS, list(labelled.soft[split]), feature=kind)
        if columns.weight is not None:
            weights = read_weights(raw.rows, columns.weight, files[split], where)
            rows = rows.add_column(WEIGHT, weights, feature=Value("float32"))
        if columns.group is not None:
            rows = rows.add_column("group", _groups(raw, table, files[split]), feature=Value("string"))
        splits[split] = rows
    if columns.has_paths:
        _check_listed_once(splits, where)
    return Source(where, splits, table.description, table.empty, table.shards)


# Images


def _paths(raw: RawRows, table: Table) -> tuple[list[str], list[str]] | None:
    """Absolute paths of a column of paths, and their names below the root; as they stand where they lie elsewhere."""
    columns, root = table.columns, table.root
    if not columns.has_paths or raw.base is None or root is None:
        return None
    values = raw.rows[columns.image][:]
    lacking = next((row for row, value in enumerate(values) if not (value and value.strip())), None)
    if lacking is not None:
        raise DataError(f"{table.name}: the column {columns.image!r} names no image in row {lacking}")
    if raw.names is not None:
        return values, raw.rows[raw.names][:]
    base, below = (_as_prefix(folder) for folder in (raw.base, root))
    paths = [_joined(base, value) for value in values]
    names = [_name(path, below, value) for path, value in zip(paths, values, strict=True)]
    return list(map(stored_path, paths)), names


def _name(path: str, below: str, value: str) -> str:
    is_below = path.startswith(below) if below else not os.path.isabs(path)
    return shown_path(path.removeprefix(below) if is_below else value)


def _as_prefix(folder: Path) -> str:
    """What paths in a folder begin with."""
    text = Path(path_text(folder)).as_posix()
    return "" if text == "." else f"{text.rstrip('/')}/"


def _joined(base: str, value: str) -> str:
    """A path of a table, which begins at a folder; by text, as objects for a million paths take half a minute."""
    value = expanded(value.replace("\\", "/"))
    path = value if os.path.isabs(value) else base + value
    return path if os.path.normpath(path) == path else Path(path).as_posix()


def _files(raw: RawRows, split: str, paths: tuple[list[str], list[str]] | None) -> list[str]:
    """Name of each row."""
    if paths is not None:
        return paths[1]
    width = len(str(max(len(raw.rows) - 1, 1)))
    return [f"{split}/{row:0{width}d}" for row in range(len(raw.rows))]


def _images(rows: Dataset, column: str, paths: tuple[list[str], list[str]] | None, where: str) -> Dataset:
    """The column `image` alone, not decoded."""
    if paths is not None:
        images = [{"path": path, "bytes": None} for path in paths[0]]
        return Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    kept = rows.select_columns([column])
    kept = kept if column == "image" else kept.rename_column(column, "image")
    try:
        if kept.features["image"] == Value("binary_view"):
            kept = kept.cast_column("image", Value("binary"))  # of which alone datasets makes an Image
        return kept.cast_column("image", Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        kind: Any = rows.features[column]
        raise DataError(f"{where}: image_column: the column {column!r} holds {kind}, not images") from error


def _check_listed_once(splits: Mapping[str, Dataset], where: str) -> None:
    """An image may have several rows if they are the same: else it would be in two splits, or two classes."""
    files = {split: rows["file"][:] for split, rows in splits.items()}
    if len({name for names in files.values() for name in names}) == sum(map(len, files.values())):
        return
    seen: dict[str, tuple[str, Any]] = {}
    for split, rows in splits.items():
        values = [rows[name][:] for name in rows.column_names if name != WEIGHT]
        for name, *row in zip(files[split], *values, strict=True):
            if seen.setdefault(name, (split, row)) != (split, row):
                places = split if seen[name][0] == split else f"{seen[name][0]} and {split}"
                raise DataError(
                    f"{where}: {name} has two rows ({places}); allowed: one row for each image, or several that say "
                    "the same"
                )


# Groups


def _groups(raw: RawRows, table: Table, files: Sequence[str]) -> list[str]:
    column, where = str(table.columns.group), table.name
    if column == PARENT_FOLDER and PARENT_FOLDER not in raw.rows.column_names:
        return _parent_folders(files, raw.depth + (table.columns.label == CLASS_FOLDER), where)
    values = [label_text(value) for value in raw.rows[column][:]]
    if None in values:
        raise DataError(f"{where}: group_column: {column!r} holds nothing in row {values.index(None)}")
    return [same_class(value) for value in values if value is not None]


def _parent_folders(files: Sequence[str], depth: int, where: str) -> list[str]:
    """The folder that each file lies in, below `depth` folders; a file that lies in none is a group of its own."""
    folders = ["/".join(file.split("/")[depth:-1]) for file in files]
    if not any(folders):
        raise DataError(
            f"{where}: data.group_column: {PARENT_FOLDER} needs folders within the class folders, one for each group; "
            "found images that lie directly in them"
        )
    return [folder or file for folder, file in zip(folders, files, strict=True)]
