"""A folder of images as a table: its class folders, or tables of labels in it, as Kaggle and Roboflow have them."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from hfft.data.sources.advice import advice_for, refuse_unused
from hfft.data.sources.class_folders import class_folders, read_class_folders
from hfft.data.sources.columns import NoColumnError, SplitColumnError, TableColumns, choose_columns
from hfft.data.sources.datasets_library import TABLES, read_table
from hfft.data.sources.folders import files_ending, image_files, visible_files
from hfft.data.sources.layout import (
    ALLOWED,
    CLASS_FOLDER,
    FolderLayout,
    files_by_split,
    find_layout,
    split_in,
    words_of,
)
from hfft.data.sources.path_tables import ImageNames, path_below, resolve_paths
from hfft.data.sources.table import RawRows, Table, make_table
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import warn
from hfft.system.text import printable_path

_LARGE = 100_000_000  # bytes of a table; larger ones in a folder of class folders aren't opened


class UndecidedError(DataError):
    """A table names images, and which of its columns holds their labels can't be decided."""


@dataclass(frozen=True)
class LabelTables:
    """Tables that name the images of a folder and their labels.

    Attributes:
        splits: Rows by split.
        columns: Those that are used.
        warnings: What is left out.
    """

    splits: dict[str, RawRows]
    columns: TableColumns
    warnings: tuple[str, ...] = ()


def read_images(folder: Path, spec: DataSpec) -> Table:
    """Images in class folders, or with tables of labels.

    Raises:
        DataError: If it can't be decided which folders or columns are classes.
    """
    by_folder = spec.label_column == CLASS_FOLDER
    layout = find_layout(folder, by_folder=by_folder)
    is_asked = any((spec.image_column, spec.split_column, spec.label_column and not by_folder))
    files = files_ending(folder, TABLES) if layout.problem or is_asked else []
    if layout.problem or files:
        refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
        found = _read_label_tables(folder, files, spec, layout.problem or f"{folder}: columns are asked for")
    else:
        files = [] if by_folder else sorted(filter(_is_small_table, folder.iterdir()))
        found = _preferred(folder, files, spec, layout) if files else None
    if found is None:
        return read_class_folders(folder, spec, layout)
    for warning in found.warnings:
        warn(warning)
    return make_table(found.splits, spec, root=folder, columns=found.columns)


def _is_small_table(file: Path) -> bool:
    is_table = file.suffix.lower() in TABLES and file.name[0] != "." and file.is_file()
    return is_table and file.stat().st_size < _LARGE


def _read_label_tables(folder: Path, files: Sequence[Path], spec: DataSpec, problem: str) -> LabelTables:
    """The tables of a folder that name its images and hold their labels, by split.

    Raises:
        UndecidedError: If a table names the images, and which column holds labels can't be decided.
        DataError: If no table fits, or several.
    """
    images = [path_below(path, folder) for path in image_files(folder)]
    named = _naming_images(folder, files, images, spec, problem)
    chosen: dict[Path, TableColumns] = {}
    lacking = {}
    for file, (rows, column) in named.items():
        try:
            own = dataclasses.replace(spec, image_column=column)
            chosen[file] = choose_columns(rows, own, str(file), of_files=True)
        except NoColumnError as error:
            lacking[file] = error
        except DataError as error:
            raise UndecidedError(f"{problem}; a table names the images: {error}") from error
    if not chosen:
        raise UndecidedError(f"{problem}; a table names the images: {next(iter(lacking.values()))}")
    warnings = [f"{file}: left out, as it has no column of labels" for file in lacking]
    labelled = {file: named[file][0] for file in chosen}
    listed = {path for file, rows in labelled.items() for path in rows[chosen[file].image][:]}
    missing = [path for path in images if path not in listed]
    if missing:
        shown = ", ".join(file.relative_to(folder).as_posix() for file in labelled)
        count = "1 image" if len(missing) == 1 else f"{len(missing):,} images"
        warnings.append(f"{folder}: left out {count} without a label in {shown}, the first is {missing[0]}")
    image = list(chosen.values())[-1].image
    groups = files_by_split(folder, list(labelled))
    splits = {split: RawRows(_joined(folder, labelled, own, image), folder) for split, own in groups.items()}
    first = next((split for split in splits if split_in(split) == "train"), next(iter(splits)))
    if len(groups[first]) == 1:
        return LabelTables(splits, chosen[groups[first][0]], tuple(warnings))
    columns = choose_columns(
        splits[first].rows, dataclasses.replace(spec, image_column=image), str(folder), of_files=True
    )
    return LabelTables(splits, columns, tuple(warnings))


def _naming_images(
    folder: Path, files: Sequence[Path], images: Sequence[str], spec: DataSpec, problem: str
) -> dict[Path, tuple[Dataset, str]]:
    """The tables that name images, each with its column of their paths."""
    named, shown = {}, []
    for file in files:
        if {"submission", "submissions"} & set(words_of(file.stem)):
            continue
        rows = read_table(file)
        shown.append(f"{file.relative_to(folder).as_posix()} ({', '.join(rows.column_names[:8])})")
        base = file.parent.relative_to(folder).as_posix()
        base = "" if base == "." else f"{base}/"
        names = ImageNames(folder, _nearest_images(images, base, split_in(file.stem)))
        found = resolve_paths(rows, names, base, spec, file)
        if found is not None:
            named[file] = found
    if not named:
        tables = f"; no column of {', '.join(shown)} names the images" if shown else ""
        raise DataError(f"{problem}{tables}; {ALLOWED}{advice_for(visible_files(folder))}")
    return named


def _nearest_images(images: Sequence[str], base: str, split: str | None) -> Sequence[str]:
    """The images that a table may be about: those in its folder, and those of its split."""
    images = [path for path in images if path.startswith(base)] or images
    own = [path for path in images if split and any(split_in(part) == split for part in path.split("/")[:-1])]
    return own or images


def _joined(folder: Path, labelled: Mapping[Path, Dataset], files: Sequence[Path], image: str) -> Dataset:
    """Tables of one split as one, where they have the same columns and name different images."""
    parts = [labelled[file] for file in files]
    names = [name for rows in parts if image in rows.column_names for name in rows[image][:]]
    is_repeated = len(parts) > 1 and len(set(names)) < len(names)
    if is_repeated or any(rows.features != parts[0].features for rows in parts):
        shown = " and ".join(file.relative_to(folder).as_posix() for file in files)
        raise UndecidedError(f"{folder}: {shown} have labels; name one: data.source={files[0]}")
    return concatenate_datasets(parts)


# Tables in a folder of class folders


def _preferred(folder: Path, files: Sequence[Path], spec: DataSpec, layout: FolderLayout) -> LabelTables | None:
    """Tables that have more splits than the class folders; None for the class folders.

    Raises:
        DataError: If a table's labels contradict the folders.
    """
    classes = [path for split in layout.splits for path in layout.class_folders(split)]
    try:
        found = _read_label_tables(folder, files, spec, f"{folder}: the folders have names of classes")
    except UndecidedError as error:
        if any(words_of(path.name) for path in classes) and not isinstance(error.__cause__, SplitColumnError):
            return None
        raise
    except DataError:  # tables of something else
        return None
    if _contradicts(found, [path.relative_to(folder).as_posix() for path in classes]):
        label = found.columns.label
        raise DataError(
            f"{folder}: {', '.join(file.name for file in files)} and the folders name different classes; choose one: "
            f"data.label_column={label if isinstance(label, str) else list(label)} or data.label_column=class_folder"
        )
    splits = set(map(split_in, layout.splits))
    can_join = isinstance(found.columns.label, str) and spec.group_column is None
    if layout.left_out and can_join and not splits & set(found.splits):
        return _with_class_folders(folder, found, layout)
    has_more = layout.left_out and set(found.splits) > splits
    return found if has_more or (len(splits) == 1 and found.columns.split is not None) else None


def _contradicts(tables: LabelTables, folders: Collection[str]) -> bool:
    """Whether the labels of images in class folders are other classes than these, by any name."""
    labels = {one for raw in tables.splits.values() for one in _labels_by_folder(raw.rows, tables.columns)}
    names = {f"{folder}/": folder.rpartition("/")[2] for folder in folders}
    found = {
        (name, label) for place, label in labels for start, name in names.items() if f"{place}/".startswith(start)
    }
    return not len(found) == len({name for name, _ in found}) == len({label for _, label in found})


def _labels_by_folder(rows: Dataset, columns: TableColumns) -> set[tuple[str, str]]:
    """Folders of images, each with every label of its images."""
    folders = [str(path).rpartition("/")[0] for path in rows[columns.image][:]]
    if columns.label == CLASS_FOLDER:
        return {(folder, folder) for folder in folders}
    values = map(str, zip(*(rows[name][:] for name in columns.labels), strict=True))
    return set(zip(folders, values, strict=True))


def _with_class_folders(folder: Path, tables: LabelTables, layout: FolderLayout) -> LabelTables | None:
    """Tables for split folders without class folders, and the class folders as further tables.

    None where the tables have other classes.
    """
    image, label = tables.columns.image, str(tables.columns.label)
    found = class_folders(layout)
    known = {printable_path(one.path.name) for folders in found.values() for one in folders}
    if not {str(value) for raw in tables.splits.values() for value in raw.rows[label][:]} <= known:
        return None
    splits = {}
    for split, folders in found.items():
        paths = [path_below(file, folder) for one in folders for file in one.images]
        labels = [printable_path(one.path.name) for one in folders for _ in one.images]
        splits[split] = RawRows(Dataset.from_dict({image: paths, label: labels}), folder)
    columns = dataclasses.replace(tables.columns, split=None, unused=())
    return LabelTables({**splits, **tables.splits}, columns)
