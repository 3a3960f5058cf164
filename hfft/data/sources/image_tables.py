"""Tables that name image files, by path, file name or id: alone, or in a folder of images (Kaggle, Roboflow)."""

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from datasets import Dataset, Value, concatenate_datasets

from hfft.data.images.decoding import stored_path
from hfft.data.sources.advice import advice_for, check_header_row, check_paths, missing_path, not_found, refuse_unused
from hfft.data.sources.class_folders import class_folders, read_class_folders
from hfft.data.sources.columns import NoColumnError, SplitColumnError, TableColumns, choose_columns, first_paths
from hfft.data.sources.folders import (
    ALLOWED,
    CLASS_FOLDER,
    FolderLayout,
    endings,
    files_by_split,
    files_ending,
    files_in,
    filled_subfolders,
    find_layout,
    image_files,
    is_image_file,
    paths_below,
    split_in,
    split_names,
    subfolders,
    visible_files,
    words_of,
)
from hfft.data.sources.table import RawRows, Table, make_table
from hfft.data.sources.table_files import TABLES, read_table_file
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import warn
from hfft.system.files import expanded
from hfft.system.text import path_text, printable_path

_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")  # as datasets' imagefolder has them
_SAMPLE = 200  # values of a column that are looked up among the images
_MOST = 1_000_000  # files that are listed to find the images of a table
_LARGE = 100_000_000  # bytes of a table; larger ones in a folder of class folders aren't opened
_REPLACED = "hfft's own: the column that is replaced"
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts in front of a file's name


class UndecidedError(DataError):
    """A table names images, and which of its columns holds their labels can't be decided."""


# Tables alone


def read_path_tables(files: Mapping[str, Path], spec: DataSpec, root: Path, *, depth: int = 0) -> Table:
    """Tables of paths by split; paths begin at `image_folder`, else at the table's own folder.

    Images are named below `root`, of whose folders the first `depth` tell no class.
    """
    images = spec.image_folder and Path(expanded(spec.image_folder))
    if images and not images.is_dir():
        raise DataError(f"data.image_folder: {missing_path(str(spec.image_folder))}")
    splits = {}
    for split, file in files.items():
        base = images or file.parent
        rows, spec = _locate_images(read_table_file(file), base, spec, file)
        splits[split] = RawRows(rows, base, depth)
    return make_table(splits, spec, root=images or root)


def read_text_tables(folder: Path, files: Sequence[Path], spec: DataSpec) -> Table:
    """Text tables of a folder without images, one for each split."""
    refuse_unused(spec, ("config", "revision"), f"{folder} is a folder of tables")
    splits = files_by_split(folder, files)
    for named in splits.values():
        if len(named) > 1:
            shown = paths_below(folder, named)
            raise DataError(f"{folder}: {shown} are tables of one split; allowed: one each, called like the split")
    return read_path_tables({split: named[0] for split, named in splits.items()}, spec, folder)


def metadata_files(folder: Path) -> list[Path]:
    """The tables called `metadata` that lie in a folder of images, or in its split folders."""
    children = subfolders(folder)
    splits = split_names(path.name for path in children)
    places = [folder, *(path for path in children if path.name in splits)]
    return [file for place in places for file in files_in(place) if file.name.lower() in _METADATA]


def read_metadata(folder: Path, files: Sequence[Path], spec: DataSpec) -> Table:
    """Tables called `metadata`: of the whole folder, or of its split folders."""
    refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
    if files[0].parent == folder:
        if len(files) > 1:
            shown = paths_below(folder, files)
            raise DataError(f"{folder}: found {shown}; allowed: one table for the folder, or one in each split folder")
        return read_path_tables({"train": files[0]}, spec, folder)
    names = split_names(path.name for path in filled_subfolders(folder))
    tables = {names.get(file.parent.name, file.parent.name): file for file in files}
    lacking = [name for name in names.values() if name not in tables]
    if lacking:
        raise DataError(f"{folder}: found tables in {', '.join(tables)} and none in {', '.join(lacking)}; add one")
    return read_path_tables(tables, spec, folder, depth=1)


# Images by what a table calls them


class ImageNames:
    """Image files below a folder, to be found by what a table calls them: path, file name, or name without ending."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        """Of images at these paths below the folder."""
        self.root = root
        self._exact: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self._others: dict[str, str] = {}  # the second image of a name
        for path in paths:
            for name, known in ((path, self._exact), (path.rpartition("/")[2], self._last)):
                name = unicodedata.normalize("NFC", name)  # macOS writes names in the other form
                for key in (name, name.rpartition(".")[0]):
                    if known.setdefault(key, path) != path:
                        self._others[key] = path

    def find(self, value: object, base: str) -> list[str]:
        """The images that a value may mean: none, one or two.

        `base` is the table's own folder, with a slash at its end; empty for that of the images.
        """
        text = unicodedata.normalize("NFC", str(value)).strip().replace("\\", "/")
        text = text.rpartition("?d=")[2].removeprefix("./")  # Label Studio's local files end in ?d=PATH
        parts = text.split("/")
        stem, dot, ending = parts[-1].rpartition(".")
        names = [parts[-1], _UPLOADED.sub("", parts[-1]), *([stem] if dot + ending.lower() in endings() else [])]
        paths = [base + text, *("/".join(parts[place:]) for place in range(len(parts)))]
        for known, keys in ((self._exact, paths), (self._last, names)):
            for key in keys:
                if key in known:
                    return [known[key], *([self._others[key]] if key in self._others else [])]
        return []


def _resolve_paths(
    rows: Dataset, names: ImageNames, base: str, spec: DataSpec, file: Path
) -> tuple[Dataset, str] | None:
    """Rows with the path of each image, and the column that holds it; None where no column names images."""
    kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items() if isinstance(kind, Value)}
    texts = [name for name, kind in kinds.items() if kind.startswith(("string", "large_string", "int", "uint"))]
    counts = {}
    for column in [name for name in texts if name == spec.image_column] or texts:
        sample = {value for value in rows[column][:_SAMPLE] if value is not None}
        found = [names.find(value, base) for value in sample]
        counts[column] = len(set().union(*found)) if sum(map(bool, found)) * 2 > len(sample) else 0
    column = max(counts, key=lambda name: counts[name], default=None)
    if column is None or counts[column] == 0:
        return None
    check_header_row([column], str(file), is_row=bool(names.find(column, base)) and column[:1].isdigit())
    paths: list[str | None] = []
    for value in rows[column][:]:
        images = [] if value is None else sorted(names.find(value, base))
        if len(images) > 1:
            raise DataError(
                f"{file}: {value} may be {images[0]} or {images[1]}; name the folder of its images: "
                f"data.source={file} data.image_folder={(names.root / images[1]).parent}"
            )
        paths.append(next(iter(images), None if value is None else f"{base}{value}"))
    order = rows.column_names
    rows = rows.rename_column(column, _REPLACED).add_column(column, paths, feature=Value("string"))
    return rows.select_columns(order), column


def _path_below(path: Path, folder: Path) -> str:
    """A path below a folder as rows have it."""
    return stored_path(path_text(path.relative_to(folder).as_posix()))


def _locate_images(rows: Dataset, base: Path, spec: DataSpec, file: Path) -> tuple[Dataset, DataSpec]:
    """The table; where its paths lead nowhere, with the images below its folder that are called so."""
    check_header_row(rows.column_names, str(file))
    paths = first_paths(rows, spec)
    if paths is None or not base.is_dir() or _exist(paths[:3], base):
        return rows, spec
    try:
        files = list(islice(visible_files(base), _MOST))
    except DataError:  # it may be the root of a file system
        return rows, spec
    images = [_path_below(path, base) for path in files if is_image_file(path)]
    found = _resolve_paths(rows, ImageNames(base, images), "", spec, file)
    if found is not None:
        return found[0], replace(spec, image_column=found[1])
    check_paths(paths, f"{file}: image_column: a column")
    has_endings = any(Path(path).suffix.lower() in endings() for path in paths)
    if paths and not _exist(paths, base) and (images or advice_for(files) or not has_endings):
        raise not_found(base / paths[0], str(file))
    return rows, spec


def _exist(paths: Sequence[str], base: Path) -> bool:
    return any(os.path.exists(base / expanded(path.replace("\\", "/"))) for path in paths)


# Tables in a folder with images


@dataclass(frozen=True)
class _LabelTables:
    """Tables that name the images of a folder and their labels, and what to warn of where they are used."""

    splits: dict[str, RawRows]
    columns: TableColumns
    warnings: Sequence[str] = ()


def read_images(folder: Path, spec: DataSpec) -> Table:
    """Images in class folders, or with tables of labels."""
    by_folder = spec.label_column == CLASS_FOLDER
    layout = find_layout(folder, by_folder=by_folder)
    is_asked = any((spec.image_column, spec.split_column, spec.label_column and not by_folder))
    files = files_ending(folder, TABLES) if layout.problem or is_asked else []
    if layout.problem or files:
        refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
        found = _read_label_tables(folder, files, spec, layout.problem or f"{folder}: columns are asked for")
    else:
        tables = () if by_folder else (file for file in files_in(folder) if file.suffix.lower() in TABLES)
        found = _preferred(folder, [file for file in tables if file.stat().st_size < _LARGE], spec, layout)
    if found is None:
        return read_class_folders(folder, spec, layout)
    for warning in found.warnings:
        warn(warning)
    return make_table(found.splits, spec, root=folder, columns=found.columns)


def _read_label_tables(folder: Path, files: Sequence[Path], spec: DataSpec, problem: str) -> _LabelTables:
    """The tables of a folder that name its images and hold their labels, by split.

    Raises:
        UndecidedError: If a table names the images, and which column holds labels can't be decided.
        DataError: If no table fits, or several.
    """
    images = [_path_below(path, folder) for path in image_files(folder)]
    named = _naming_images(folder, files, images, spec, problem)
    chosen: dict[Path, TableColumns] = {}
    lacking = {}
    for file, (rows, column) in named.items():
        try:
            chosen[file] = choose_columns(rows, replace(spec, image_column=column), str(file), of_files=True)
        except NoColumnError as error:
            lacking[file] = error
        except DataError as error:
            raise UndecidedError(f"{problem}; a table names the images: {error}") from error
    if not chosen:
        raise UndecidedError(f"{problem}; a table names the images: {next(iter(lacking.values()))}")
    warnings = [f"{file}: left out, as it has no column of labels" for file in lacking]
    labelled = {file: named[file][0] for file in chosen}
    known = {path for file, rows in labelled.items() for path in rows[chosen[file].image][:]}
    missing = [path for path in images if path not in known]
    if missing:
        count = "1 image" if len(missing) == 1 else f"{len(missing):,} images"
        shown = paths_below(folder, labelled)
        warnings.append(f"{folder}: left out {count} without a label in {shown}, the first is {missing[0]}")
    image = list(chosen.values())[-1].image
    groups = files_by_split(folder, list(labelled))
    splits = {split: RawRows(_joined(folder, labelled, own, image), folder) for split, own in groups.items()}
    first = next((split for split in splits if split_in(split) == "train"), next(iter(splits)))
    if len(groups[first]) == 1:
        return _LabelTables(splits, chosen[groups[first][0]], warnings)
    columns = choose_columns(splits[first].rows, replace(spec, image_column=image), str(folder), of_files=True)
    return _LabelTables(splits, columns, warnings)


def _naming_images(
    folder: Path, files: Sequence[Path], images: Sequence[str], spec: DataSpec, problem: str
) -> dict[Path, tuple[Dataset, str]]:
    """The tables that name images, each with its column of their paths."""
    named, shown = {}, []
    for file in files:
        if {"submission", "submissions"} & set(words_of(file.stem)):
            continue
        rows = read_table_file(file)
        shown.append(f"{file.relative_to(folder).as_posix()} ({', '.join(rows.column_names[:8])})")
        base = file.parent.relative_to(folder).as_posix()
        base = "" if base == "." else f"{base}/"
        names = ImageNames(folder, _nearest_images(images, base, split_in(file.stem)))
        found = _resolve_paths(rows, names, base, spec, file)
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


def _preferred(folder: Path, files: Sequence[Path], spec: DataSpec, layout: FolderLayout) -> _LabelTables | None:
    """Tables that have more splits than the class folders, and agree with them; None for the class folders."""
    if not files:
        return None
    classes = [path for root in layout.roots for path in subfolders(root)]
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


def _contradicts(tables: _LabelTables, folders: Collection[str]) -> bool:
    """Whether the labels of images in class folders are other classes than these, by any name."""
    labels = {one for raw in tables.splits.values() for one in _labels_by_folder(raw.rows, tables.columns)}
    found = {
        (path.rpartition("/")[2], label)
        for place, label in labels
        for path in folders
        if f"{place}/".startswith(f"{path}/")
    }
    return not len(found) == len({name for name, _ in found}) == len({label for _, label in found})


def _labels_by_folder(rows: Dataset, columns: TableColumns) -> set[tuple[str, str]]:
    """Folders of images, each with every label of its images."""
    folders = [str(path).rpartition("/")[0] for path in rows[columns.image][:]]
    if columns.label == CLASS_FOLDER:
        return {(folder, folder) for folder in folders}
    values = map(str, zip(*(rows[name][:] for name in columns.labels), strict=True))
    return set(zip(folders, values, strict=True))


def _with_class_folders(folder: Path, tables: _LabelTables, layout: FolderLayout) -> _LabelTables | None:
    """Tables for split folders without class folders, and the class folders as further tables.

    None where the tables have other classes.
    """
    image, label = tables.columns.image, str(tables.columns.label)
    splits, known = {}, set()
    for split, folders in class_folders(layout).items():
        paths = [_path_below(file, folder) for one in folders for file in one.images]
        labels = [printable_path(one.path.name) for one in folders for _ in one.images]
        known.update(printable_path(one.path.name) for one in folders)
        splits[split] = RawRows(Dataset.from_dict({image: paths, label: labels}), folder)
    if not {str(value) for raw in tables.splits.values() for value in raw.rows[label][:]} <= known:
        return None
    return _LabelTables({**splits, **tables.splits}, replace(tables.columns, split=None, unused=()))
