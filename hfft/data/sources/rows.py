"""Tables of any columns -> rows as the rest of hfft takes them: an image not decoded, a class, a name."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hfft.data.images.decoding import shown_path, stored_path
from hfft.data.sources.folders import split_in
from hfft.data.sources.label_columns import is_label_name, plain_name
from hfft.data.sources.label_sets import declared_names, holds_sets, read_sets
from hfft.data.sources.label_values import (
    class_spellings,
    is_number,
    label_text,
    label_texts,
    same_class,
    warn_of_nothing,
)
from hfft.data.sources.labels import UNLABELLED, label_feature
from hfft.data.sources.layout import CLASS_FOLDER, divide, folders_of
from hfft.data.sources.split_columns import split_by_column
from hfft.data.sources.tables import PARENT_FOLDER, Columns, choose_columns
from hfft.data.sources.targets import SHARES, WEIGHT, holds_lists, read_shares, read_weights
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.messages import say, warn
from hfft.system.paths import expanded
from hfft.system.text import path_text, printable


@dataclass(frozen=True)
class Table:
    """Rows with any columns.

    Attributes:
        rows: The table.
        base: Folder that paths in it begin at; None where images are in the table itself.
        depth: Folders that the names of all its images begin with and that tell no class: that of the split.
        names: Column with the names of images whose paths are none: parts of tar files.
    """

    rows: Dataset
    base: Path | None = None
    depth: int = 0
    names: str | None = None


@dataclass(frozen=True)
class Source:
    """What a source holds; a filter of rows stands between this and the splits of a run.

    Attributes:
        name: In messages.
        splits: Rows by the source's own split names, with `image` (`bytes` and `path`), `label` (-1 for none;
            multi-label, a list, or None for none), `file` and, where groups were asked for, `group`.
        columns: Which columns of a table are used for what, in words; empty for folders.
        empty: By split, class folders without an image.
        shards: Tar files, or Parquet files of a folder, that hold the images; 0 for other sources.
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


def standardize(tables: dict[str, Table], spec: DataSpec, where: str, *, root: Path | None = None) -> Source:
    """Give tables our columns and one list of class names.

    Args:
        tables: By split name.
        spec: For the columns that were asked for.
        where: Names the source in errors.
        root: Folder that files are named below; None where images are in the tables.

    Raises:
        DataError: If a column isn't there or holds something else.
    """
    if not tables:
        raise DataError(f"{where}: holds no splits")
    first = next((table for split, table in tables.items() if split_in(split) == "train"), next(iter(tables.values())))
    columns = choose_columns(first.rows, spec, where, of_files=root is not None)
    if len(tables) > 1:
        _check_told_once(tables, columns.split, spec, where)
        columns = replace(columns, split=None)
    _tell_of_columns(columns, first.rows, spec, where)
    tables = _by_split(_with_labels(tables, first.rows.column_names, columns, where), columns, where)
    tables = {printable(split): table for split, table in tables.items()}
    paths = {split: _paths(table, columns, where, root) for split, table in tables.items()}
    files = {split: _files(table, split, paths[split]) for split, table in tables.items()}
    rows_by_split = {split: table.rows for split, table in tables.items()}
    is_multi_label = holds_sets(rows_by_split, columns.label, spec.task, files, where)
    shares: dict[str, np.ndarray] = {}
    if is_multi_label:
        sets = read_sets(rows_by_split, columns.label, files, where)
        names, labels = sets.names, sets.rows
    else:
        names, labels, shares = _labels(tables, columns, files, where)
    splits = {}
    for split, table in tables.items():
        rows = _with_images(table.rows, columns, paths[split], where)
        rows = rows.add_column("label", labels[split], feature=label_feature(names, is_multi_label=is_multi_label))
        rows = rows.add_column("file", files[split], feature=Value("string"))
        if split in shares:
            rows = rows.add_column(SHARES, list(shares[split]), feature=List(Value("float32"), length=len(names)))
        if columns.weight is not None:
            weights = read_weights(table.rows, columns.weight, files[split], where)
            rows = rows.add_column(WEIGHT, weights.tolist(), feature=Value("float32"))
        groups = _groups(table, columns, files[split], where)
        splits[split] = rows if groups is None else rows.add_column("group", groups, feature=Value("string"))
    if columns.has_paths:
        _check_listed_once(splits, where)
    return Source(where, splits, columns.described())


def rows_of(paths: Sequence[str], labels: Sequence[int], files: Sequence[str], names: Sequence[str]) -> Dataset:
    """Rows of images in files.

    Args:
        paths: Of each image.
        labels: Index of each image's class.
        files: Name of each image.
        names: Class names.
    """
    images = [{"path": path, "bytes": None} for path in paths]
    return Dataset.from_dict({"image": images, "label": labels, "file": files}, features=row_features(names))


def row_features(names: Sequence[str]) -> Features:
    """The types of the columns that every row has."""
    return Features({"image": Image(decode=False), "label": ClassLabel(names=list(names)), "file": Value("string")})


def parent_folders(files: Sequence[str], depth: int, where: str) -> list[str]:
    """The folder that each file lies in, below `depth` folders; a file that lies in none is a group of its own.

    Raises:
        DataError: If that is so of every file.
    """
    folders = ["/".join(file.split("/")[depth:-1]) for file in files]
    if not any(folders):
        raise DataError(
            f"{where}: data.group_column: {PARENT_FOLDER} needs folders within the class folders, one for each group; "
            f"found images that lie directly in them"
        )
    return [folder or file for folder, file in zip(folders, files, strict=True)]


def _by_split(tables: dict[str, Table], columns: Columns, where: str) -> dict[str, Table]:
    """Divide a single table by its column of splits, or by the split folders that its paths begin with."""
    if len(tables) > 1:
        return tables
    (table,) = tables.values()
    if columns.split is not None:
        parts = split_by_column(table.rows, columns.split, where)
        return {name: replace(table, rows=rows) for name, rows in parts.items()}
    if not columns.has_paths or table.names is not None or table.depth:
        return tables
    divided = divide(list(map(folders_of, table.rows[columns.image][:])))
    if divided is None:
        return tables
    places: dict[str, list[int]] = {}
    for place, name in enumerate(divided[0]):
        places.setdefault(name, []).append(place)
    return {name: replace(table, rows=table.rows.select(rows), depth=1) for name, rows in places.items()}


def _tell_of_columns(columns: Columns, rows: Dataset, spec: DataSpec, where: str) -> None:
    """Say which columns were found by their values, whatever their names, and which are not used."""
    for words in columns.unused:
        warn(f"{where}: {words}")
    label = columns.label
    is_plain = isinstance(label, str) and isinstance(rows.features.get(label), Value) and label != CLASS_FOLDER
    if spec.label_column is None and is_plain and not is_label_name(str(label)):
        warn(f"{where}: takes the labels from {label!r}, whose values alone repeat; data.label_column names another")
    if spec.split_column is None and columns.split is not None and plain_name(columns.split) != "split":
        say(f"{where}: takes the splits from the column {columns.split!r}")


def _with_labels(tables: dict[str, Table], known: Collection[str], columns: Columns, where: str) -> dict[str, Table]:
    """The tables that have the columns that are used; one that lacks nothing but labels is left out with a word."""
    kept = {}
    for split, table in tables.items():
        names, wanted = set(table.rows.column_names), set(columns.named())
        if wanted <= names:
            kept[split] = table
            continue
        labels = {columns.label} if isinstance(columns.label, str) else set(columns.label)
        if not (wanted - names <= labels and names <= set(known)):
            raise DataError(f"{where}: split {split!r} has other columns: {', '.join(table.rows.column_names)}")
        warn(f"{where}: left out {split!r}, whose {len(table.rows):,} rows have no labels")
    return kept


def _check_told_once(tables: Mapping[str, Table], column: str | None, spec: DataSpec, where: str) -> None:
    """Tables of one split each need no column of splits, and must not name another split in one."""
    if spec.split_column is not None:
        raise DataError(f"{where}: data.split_column: there are splits already ({', '.join(tables)}); leave it out")
    for split, table in tables.items():
        if column is None or column not in table.rows.column_names or split_in(split) is None:
            continue
        told = {name: split_in(name) for name in split_by_column(table.rows, column, where)}
        odd = next((name for name, other in told.items() if other not in (None, split_in(split))), None)
        if odd is None:
            continue
        problem = f"{where}: the table of the split {split!r} holds rows of {odd!r} in its column {column!r}"
        if table.base is not None:
            raise DataError(f"{problem}; name one table (data.source), or rename the column")
        warn(f"{problem}, which is not used")


def _paths(table: Table, columns: Columns, where: str, root: Path | None) -> tuple[list[str], list[str]] | None:
    """Absolute paths of a column of paths, and their names below `root`, or as they stand where they lie elsewhere."""
    if not columns.has_paths or table.base is None or root is None:
        return None
    values = table.rows[columns.image][:]
    lacking = next((row for row, value in enumerate(values) if not (value and value.strip())), None)
    if lacking is not None:
        raise DataError(f"{where}: the column {columns.image!r} names no image in row {lacking}")
    if table.names is not None:
        return values, table.rows[table.names][:]
    base, below = (_as_prefix(folder) for folder in (table.base, root))
    paths = [_joined(base, value) for value in values]
    names = [_name(path, below, value) for path, value in zip(paths, values, strict=True)]
    return list(map(stored_path, paths)), names


def _name(path: str, below: str, value: str) -> str:
    """The path below a folder; as it stands in the table where it lies elsewhere."""
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


def _files(table: Table, split: str, paths: tuple[list[str], list[str]] | None) -> list[str]:
    if paths is not None:
        return paths[1]
    width = len(str(max(len(table.rows) - 1, 1)))
    return [f"{split}/{row:0{width}d}" for row in range(len(table.rows))]


def _check_listed_once(splits: Mapping[str, Dataset], where: str) -> None:
    """An image may have several rows if they say the same: else it would be in two splits, or two classes."""
    files = {split: rows["file"][:] for split, rows in splits.items()}
    if len({name for names in files.values() for name in names}) == sum(map(len, files.values())):
        return
    seen: dict[str, tuple[str, Any]] = {}
    for split, rows in splits.items():
        said = [rows[name][:] for name in rows.column_names if name != WEIGHT]
        for name, *row in zip(files[split], *said, strict=True):
            if seen.setdefault(name, (split, row)) != (split, row):
                places = split if seen[name][0] == split else f"{seen[name][0]} and {split}"
                raise DataError(
                    f"{where}: {name} has two rows ({places}); allowed: one row for each image, or several that say "
                    "the same"
                )


def _labels(
    tables: Mapping[str, Table], columns: Columns, files: Mapping[str, Sequence[str]], where: str
) -> tuple[list[str], dict[str, list[int]], dict[str, np.ndarray]]:
    """Class names, and by split the class of each row, -1 for none, and its shares where labels are soft."""
    label, first = columns.label, next(iter(tables.values())).rows
    if isinstance(label, tuple) or (label in first.column_names and holds_lists(first, label)):
        shares = {split: read_shares(table.rows, label, files[split], where) for split, table in tables.items()}
        width = next(iter(shares.values())).shape[1]
        names = [printable(name) for name in label] if isinstance(label, tuple) else list(map(str, range(width)))
        return names, {split: values.argmax(axis=1).tolist() for split, values in shares.items()}, shares
    texts = {split: _texts(table, label, files[split], where) for split, table in tables.items()}
    found = {text for column in texts.values() for text in column if text is not None}
    names = declared_names({split: table.rows for split, table in tables.items()}, label)
    declared = [name for name in map(label_text, names) if name is not None]
    rows = sum(map(len, texts.values()))
    are_numbers = not declared and len(found) > max(10, rows / 2) and all(map(is_number, found))
    if are_numbers and any(float(text) % 1 for text in found):
        raise DataError(
            f"{where}: label_column: the column {label!r} holds {len(found)} different numbers in {rows} rows, "
            f"such as {min(found)}; allowed: classes, of which most have several images"
        )
    if label != CLASS_FOLDER:
        warn_of_nothing(found, declared, where)
    spellings = class_spellings(found, declared, where)
    names = list(dict.fromkeys(spellings.values()))
    places = {name: place for place, name in enumerate(names)}
    numbers = {None: UNLABELLED, **{text: places[name] for text, name in spellings.items()}}
    return names, {split: [numbers[text] for text in column] for split, column in texts.items()}, {}


def _texts(table: Table, label: str, files: Sequence[str], where: str) -> list[str | None]:
    """The label of each row as text, whatever its type; None for a row without one."""
    if label == CLASS_FOLDER and label not in table.rows.column_names:
        parts = [file.split("/")[table.depth :] for file in files]
        if all(len(part) == 1 for part in parts):
            raise DataError(f"{where}: label_column: none fits; name one of {', '.join(table.rows.column_names)}")
        return label_texts([part[0] if len(part) > 1 else None for part in parts], files, where)
    feature = table.rows.features[label]
    values = table.rows[label][:]
    if isinstance(feature, ClassLabel):
        values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
    elif not isinstance(feature, Value):
        raise DataError(f"{where}: label_column: the column {label!r} holds {feature}; allowed: one class per image")
    return label_texts(values, files, where)


def _with_images(rows: Dataset, columns: Columns, paths: tuple[list[str], list[str]] | None, where: str) -> Dataset:
    """The column `image` alone, not decoded."""
    if paths is not None:
        images = [{"path": path, "bytes": None} for path in paths[0]]
        return Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    kept = rows.select_columns([columns.image])
    kept = kept if columns.image == "image" else kept.rename_column(columns.image, "image")
    try:
        if kept.features["image"] == Value("binary_view"):
            kept = kept.cast_column("image", Value("binary"))  # of which alone datasets makes an Image
        return kept.cast_column("image", Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        kind: Any = rows.features[columns.image]
        raise DataError(f"{where}: image_column: the column {columns.image!r} holds {kind}, not images") from error


def _groups(table: Table, columns: Columns, files: Sequence[str], where: str) -> list[str] | None:
    if columns.group is None:
        return None
    if columns.group == PARENT_FOLDER and PARENT_FOLDER not in table.rows.column_names:
        return parent_folders(files, table.depth + (columns.label == CLASS_FOLDER), where)
    values = list(map(label_text, table.rows[columns.group][:]))
    if None in values:
        raise DataError(f"{where}: group_column: {columns.group!r} holds nothing in row {values.index(None)}")
    return [same_class(value) for value in values if value is not None]
