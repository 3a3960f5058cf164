"""A folder of images -> its rows: from class folders, or from tables of labels beside the images."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Value

from hfft.data.images.decoding import stored_path
from hfft.data.sources.advice import advice_for
from hfft.data.sources.folders import (
    holds_images,
    image_files,
    split_in,
    subfolders,
    table_files,
    visible_files,
    warn_of_left_out,
    words_of,
)
from hfft.data.sources.label_tables import Listed, UndecidedError, read_label_tables
from hfft.data.sources.label_values import folder_classes
from hfft.data.sources.labels import UNLABELLED
from hfft.data.sources.layout import CLASS_FOLDER, Layout, find_layout
from hfft.data.sources.rows import Source, Table, parent_folders, rows_of, standardize
from hfft.data.sources.split_columns import SplitColumnError
from hfft.data.sources.tables import PARENT_FOLDER
from hfft.data.sources.text_tables import TEXT_TABLES
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.messages import warn
from hfft.system.text import path_text, printable_path

_TABLES = (*TEXT_TABLES, ".parquet")
_LARGE = 100_000_000  # bytes of a table beside class folders; larger ones aren't looked into


def read_images(folder: Path, spec: DataSpec) -> Source:
    """Rows of images in class folders, or with a table of labels beside them.

    Raises:
        DataError: If it can't be told which folders or columns are classes.
    """
    by_folder = spec.label_column == CLASS_FOLDER
    layout = find_layout(folder, by_folder=by_folder)
    is_asked = any((spec.image_column, spec.split_column, spec.label_column and not by_folder))
    tables = table_files(folder, _TABLES) if layout.problem or is_asked else []
    if layout.problem or tables:
        refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
        listed = read_label_tables(folder, tables, spec, layout.problem or f"{folder}: columns are asked for")
    else:
        beside = [] if by_folder else sorted(filter(_is_small_table, folder.iterdir()))
        listed = _preferred(folder, beside, spec, layout) if beside else None
    if listed is None:
        return read_class_folders(folder, spec, layout)
    for word in listed.words:
        warn(word)
    spec = dataclasses.replace(spec, image_column=listed.columns.image)
    return standardize(listed.tables, spec, spec.source, root=folder)


def _is_small_table(file: Path) -> bool:
    is_table = file.suffix.lower() in _TABLES and file.name[0] != "." and file.is_file()
    return is_table and file.stat().st_size < _LARGE


def _preferred(folder: Path, files: Sequence[Path], spec: DataSpec, layout: Layout) -> Listed | None:
    """Tables beside class folders that tell of more splits than these.

    Raises:
        DataError: If a table's labels contradict the folders.
    """
    classes = [path for split in layout.splits for path in layout.class_folders(split)]
    try:
        listed = read_label_tables(folder, files, spec, f"{folder}: the folders have names of classes")
    except UndecidedError as error:
        if any(words_of(path.name) for path in classes) and not isinstance(error.__cause__, SplitColumnError):
            return None
        raise
    except DataError:  # tables of something else
        return None
    roots = [path.relative_to(folder).as_posix() for path in classes]
    if listed.contradicts(roots):
        label = listed.columns.label
        raise DataError(
            f"{folder}: the folders tell other classes than {', '.join(file.name for file in files)}; choose one: "
            f"data.label_column={label if isinstance(label, str) else list(label)} or data.label_column=class_folder"
        )
    splits = set(map(split_in, layout.splits))
    can_join = isinstance(listed.columns.label, str) and spec.group_column is None
    if layout.left_out and can_join and not splits & set(listed.tables):
        return _with_class_folders(folder, listed, layout)
    is_richer = layout.left_out and set(listed.tables) > splits
    return listed if is_richer or (len(splits) == 1 and listed.columns.split is not None) else None


def _with_class_folders(folder: Path, listed: Listed, layout: Layout) -> Listed | None:
    """Tables for folders without class folders, and the class folders as further tables; None for other classes."""
    image, label = listed.columns.image, str(listed.columns.label)
    found = _images_by_class(layout)
    known = {printable_path(path.name) for children in found.values() for path, _ in children}
    if not {str(value) for table in listed.tables.values() for value in table.rows[label][:]} <= known:
        return None
    tables = {}
    for split, children in found.items():
        names = [path_text(file.relative_to(folder).as_posix()) for _, images in children for file in images]
        labels = [printable_path(path.name) for path, images in children for _ in images]
        tables[split] = Table(Dataset.from_dict({image: list(map(stored_path, names)), label: labels}), folder)
    return dataclasses.replace(listed, tables={**tables, **listed.tables}, words=())


def refuse_unused(spec: DataSpec, keys: Sequence[str], what: str) -> None:
    """Keys of the data section that a source has no use for.

    Raises:
        DataError: If one of them is set.
    """
    unused = [key for key in keys if getattr(spec, key) is not None]
    if unused:
        raise DataError(f"data.{unused[0]}: {what}, which has none; leave it out")


def read_class_folders(folder: Path, spec: DataSpec, layout: Layout) -> Source:
    """Rows of images in class folders; what is left out is said.

    Raises:
        DataError: If there are none.
    """
    keys = ("config", "revision", "image_column", "split_column", "image_folder")
    refuse_unused(spec, keys, f"{folder} is a folder of images")
    if spec.label_column not in (None, CLASS_FOLDER):
        raise DataError(f"data.label_column: {folder} is a folder of images, which has none; leave it out")
    if spec.task == "multi_label":
        raise DataError(
            f"data.task: {folder} is a folder of class folders, where an image has one label; multi_label needs a "
            "table with lists of labels, or with columns of 0 and 1"
        )
    if spec.group_column not in (None, PARENT_FOLDER):
        raise DataError(f"data.group_column: found {spec.group_column!r}; allowed for class folders: {PARENT_FOLDER}")
    warn_of_left_out(folder, [root for roots in layout.splits.values() for root in roots])
    for path in layout.left_out:
        count = len(image_files(path))
        images = "1 image, which lies" if count == 1 else f"{count:,} images, which lie"
        reason = f"{images} in no class folder and so {'has' if count == 1 else 'have'} no label"
        warn(f"{path}: left out {reason if count else 'the split, which holds no images'}")
    if layout.problem:  # and no image
        advice = advice_for(visible_files(folder))
        raise DataError(f"{layout.problem}; allowed: one folder of images per class{advice}")
    if len(layout.splits) == 1:
        _tell_of_lists(folder)
    found = _images_by_class(layout)
    classes = folder_classes((child.name for children in found.values() for child, _ in children), str(folder))
    if not (spec.group_column or spec.label_column):
        _tell_of_inner(next(iter(found.values())), folder)
    splits, empty = {}, {}
    for split, children in found.items():
        splits[split] = _class_folder_rows(children, folder, classes, spec.group_column)
        filled = {classes[child.name] for child, files in children if files}
        empty[split] = tuple(str(child) for child, _ in children if classes[child.name] not in filled)
    return Source(str(spec.source), splits, empty=empty)


def _images_by_class(layout: Layout) -> dict[str, list[tuple[Path, list[Path]]]]:
    """By split, each class folder and its images."""
    return {split: [(path, image_files(path)) for path in layout.class_folders(split)] for split in layout.splits}


def _tell_of_lists(folder: Path) -> None:
    """Warn of text files beside class folders that list the images of splits, as Food-101 has them."""
    places = [folder, *(path for path in subfolders(folder) if not holds_images(path))]
    files = [file for place in places for file in sorted(place.iterdir()) if file.suffix.lower() in (".txt", ".json")]
    lists = [file for file in files if split_in(file.stem)]
    if len({split_in(file.stem) for file in lists}) > 1:
        shown = ", ".join(file.relative_to(folder).as_posix() for file in lists[:3])
        warn(f"{folder}: lists of splits are not read: {shown}; write a table with columns path and split (.csv)")


def _tell_of_inner(found: Sequence[tuple[Path, list[Path]]], folder: Path) -> None:
    """Warn where every class folder holds the same folders, which may be the classes."""
    if len(found) < 2 or any(not files or {files[0].parent, files[-1].parent} & {child} for child, files in found):
        return
    inner = {frozenset(path.relative_to(child).parts[0] for path in files) for child, files in found}
    names = sorted(next(iter(inner)))
    if len(inner) == 1 and len(names) > 1 and all(any(len(word) > 1 for word in words_of(name)) for name in names):
        classes = ", ".join(child.name for child, _ in found[:5])
        warn(
            f"{folder}: takes {classes} for the classes, though each holds the same folders ({', '.join(names[:5])}); "
            "data.label_column=class_folder says that this is right"
        )


def _class_folder_rows(
    found: Sequence[tuple[Path, list[Path]]], root: Path, classes: Mapping[str, str | None], group: str | None
) -> Dataset:
    """Rows of class folders and their images; `group` is the folder within them."""
    found = sorted(found, key=lambda one: (one[0].name, one[0]))
    names = list(dict.fromkeys(name for name in classes.values() if name is not None))
    places: dict[str | None, int] = {None: UNLABELLED, **{name: place for place, name in enumerate(names)}}
    labels = [places[classes[child.name]] for child, files in found for _ in files]
    files = [printable_path(path.relative_to(root).as_posix()) for _, files in found for path in files]
    rows = rows_of([stored_path(path_text(path)) for _, files in found for path in files], labels, files, names)
    if group is None:
        return rows
    depth = len(found[0][0].relative_to(root).parts)
    return rows.add_column("group", parent_folders(files, depth, str(root)), feature=Value("string"))
