"""Images in class folders as a table, and the files of such a folder that are left out of it."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from datasets import ClassLabel, Dataset, Features, Value

from hfft.data.images.decoding import stored_path
from hfft.data.sources.advice import advice_for, refuse_unused
from hfft.data.sources.columns import PARENT_FOLDER, TableColumns
from hfft.data.sources.folders import (
    CLASS_FOLDER,
    UNREAD,
    FolderLayout,
    files_in,
    find_layout,
    holds_images,
    image_files,
    is_image_file,
    paths_below,
    split_in,
    subfolders,
    visible_files,
    words_of,
)
from hfft.data.sources.labels import UNLABELLED, label_texts, natural, same_class
from hfft.data.sources.table import RawRows, Table
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import warn
from hfft.system.text import path_text, printable_path

_NO_CLASS = ("__MACOSX", "__pycache__")  # folders that nobody takes for a class
_MAGIC = {  # how files of a format begin
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n",
    "GIF": rb"GIF8",
    "TIFF": rb"II\*\0|MM\0\*",
    "WEBP": rb"RIFF....WEBP",
    "AVIF": rb"....ftypavif",
    "HEIF": rb"....ftyp(heic|heix|mif1)",
}


@dataclass(frozen=True)
class ClassFolder:
    """A class folder and its files at any depth: images, sorted, and others."""

    path: Path
    images: Sequence[Path]
    others: Sequence[Path]


def class_folders(layout: FolderLayout) -> dict[str, list[ClassFolder]]:
    """The class folders of each split, each listed once; several may be of one class."""
    return {
        split: [_listed(path) for root in roots for path in subfolders(root)] for split, roots in layout.splits.items()
    }


def _listed(path: Path) -> ClassFolder:
    files = list(visible_files(path))
    return ClassFolder(path, sorted(filter(is_image_file, files)), [file for file in files if not is_image_file(file)])


def read_class_folders(folder: Path, spec: DataSpec, layout: FolderLayout) -> Table:
    """Images in class folders; what is left out is logged."""
    _check_spec(folder, spec)
    found = class_folders(layout)
    every = [one for folders in found.values() for one in folders]
    _warn_of_left_out(folder, layout, every)
    if layout.problem:  # and no image
        advice = advice_for(visible_files(folder))
        raise DataError(f"{layout.problem}; allowed: one folder of images per class{advice}")
    if len(found) == 1:
        _warn_of_split_lists(folder)
    if not (spec.group_column or spec.label_column):
        _warn_of_inner_folders(next(iter(found.values())), folder)
    names = sorted({one.path.name for one in every})
    texts = label_texts(list(map(path_text, names)), list(map(printable_path, names)), str(folder))
    labels = dict(zip(names, texts, strict=True))
    classes = sorted({text for text in texts if text is not None}, key=natural)
    splits = {split: _raw_rows(folders, folder, labels, classes) for split, folders in found.items()}
    empty = {split: _empty_classes(folders, labels) for split, folders in found.items()}
    columns = TableColumns("image", CLASS_FOLDER, group=spec.group_column, has_paths=True)
    return Table(spec.source, splits, columns, root=folder, empty=empty)


def _check_spec(folder: Path, spec: DataSpec) -> None:
    """Refuse keys of tables, and labels of tables."""
    keys = ["config", "revision", "image_column", "split_column", "image_folder"]
    refuse_unused(
        spec, keys if spec.label_column == CLASS_FOLDER else [*keys, "label_column"], f"{folder} is a folder of images"
    )
    if spec.task == "multi_label":
        raise DataError(
            f"data.task: {folder} is a folder of class folders, where an image has one label; multi_label needs a "
            "table with lists of labels, or with columns of 0 and 1"
        )
    if spec.group_column not in (None, PARENT_FOLDER):
        raise DataError(f"data.group_column: found {spec.group_column!r}; allowed for class folders: {PARENT_FOLDER}")


def _raw_rows(
    folders: Sequence[ClassFolder], root: Path, labels: Mapping[str, str | None], classes: Sequence[str]
) -> RawRows:
    folders = sorted(folders, key=lambda one: (one.path.name, one.path))
    numbers: dict[str | None, int] = {None: UNLABELLED, **{name: number for number, name in enumerate(classes)}}
    files = [path for one in folders for path in one.images]
    kinds = {"image": Value("string"), CLASS_FOLDER: ClassLabel(names=list(classes)), "file": Value("string")}
    columns = {
        "image": [stored_path(path_text(path)) for path in files],
        CLASS_FOLDER: [numbers[labels[one.path.name]] for one in folders for _ in one.images],
        "file": [printable_path(path.relative_to(root).as_posix()) for path in files],
    }
    depth = len(folders[0].path.relative_to(root).parts) - 1 if folders else 0
    return RawRows(Dataset.from_dict(columns, features=Features(kinds)), root, depth, names="file")


def _empty_classes(folders: Sequence[ClassFolder], labels: Mapping[str, str | None]) -> tuple[str, ...]:
    """Class folders of whose class there is no image."""
    classes = {name: None if text is None else same_class(text) for name, text in labels.items()}
    filled = {classes[one.path.name] for one in folders if one.images}
    return tuple(str(one.path) for one in folders if classes[one.path.name] not in filled)


# What is left out


def _warn_of_left_out(folder: Path, layout: FolderLayout, folders: Sequence[ClassFolder]) -> None:
    """Warn of images, as far as their names tell, that become no row."""
    loose = _loose_files(folder, layout)
    others = [*loose, *(file for one in folders for file in one.others)]
    unread = Counter(
        ending for file in others if (ending := file.suffix.lower()) in UNREAD and not is_image_file(file)
    )
    images = sum(map(is_image_file, loose))
    hidden = sorted(
        path.name for root in layout.roots for path in root.glob("__*") if path.name not in _NO_CLASS and path.is_dir()
    )
    parts = []
    if unread:
        total = unread.total()
        files = "1 file that is not read as an image" if total == 1 else f"{total} files that are not read as images"
        parts.append(f"{files} ({', '.join(f'{ending} {count}' for ending, count in sorted(unread.items()))})")
    if images:
        parts.append(f"{images} {'image' if images == 1 else 'images'} outside the class folders")
    if hidden:
        parts.append(f"folders whose names begin with two underscores ({', '.join(hidden)})")
    if parts:
        warn(f"{folder}: left out {' and '.join(parts)}")
    for path in layout.left_out:
        count = len(image_files(path))
        images = (
            "1 image, which lies in no class folder and so has"
            if count == 1
            else f"{count:,} images, which lie in no class folder and so have"
        )
        warn(f"{path}: left out {f'{images} no label' if count else 'the split, which holds no images'}")


def _loose_files(folder: Path, layout: FolderLayout) -> list[Path]:
    """Files directly in a folder, or in those that hold its class folders."""
    return [file for path in {folder, *layout.roots} for file in files_in(path)]


def _warn_of_split_lists(folder: Path) -> None:
    """Warn of text files that list the images of splits, as Food-101 has them."""
    places = [folder, *(path for path in subfolders(folder) if not holds_images(path))]
    files = [file for place in places for file in files_in(place) if file.suffix.lower() in (".txt", ".json")]
    lists = [file for file in files if split_in(file.stem)]
    if len({split_in(file.stem) for file in lists}) > 1:
        shown = paths_below(folder, lists[:3])
        warn(f"{folder}: lists of splits are not read: {shown}; write a table with columns path and split (.csv)")


def _warn_of_inner_folders(folders: Sequence[ClassFolder], folder: Path) -> None:
    """Warn where every class folder holds the same folders and no image directly: these may be the classes."""
    if len(folders) < 2 or any(
        not one.images or one.path in (one.images[0].parent, one.images[-1].parent) for one in folders
    ):
        return
    inner = {frozenset(path.relative_to(one.path).parts[0] for path in one.images) for one in folders}
    names = sorted(next(iter(inner)))
    if len(inner) == 1 and len(names) > 1 and all(any(len(word) > 1 for word in words_of(name)) for name in names):
        classes = ", ".join(one.path.name for one in folders[:5])
        warn(
            f"{folder}: takes {classes} for the classes, though each holds the same folders ({', '.join(names[:5])}); "
            "data.label_column=class_folder says that this is right"
        )


def find_ignored(folder: Path, files: Collection[str], *, by_folder: bool = False) -> Iterator[tuple[str, str]]:
    """Images that are left out of a folder of class folders, by name or first bytes: each name, and the reason."""
    layout = find_layout(folder, by_folder=by_folder)
    loose = set(_loose_files(folder, layout))
    within = {file for root in layout.roots for child in subfolders(root) for file in visible_files(child)}
    for file in sorted(loose | within):
        reason = _why_ignored(file, is_loose=file in loose)
        name = printable_path(file.relative_to(folder).as_posix())
        if reason is not None and name not in files:
            yield name, reason


def _why_ignored(file: Path, *, is_loose: bool) -> str | None:
    if is_image_file(file):
        return "lies outside the class folders" if is_loose else None
    if file.suffix.lower() in UNREAD:
        return f"{file.suffix.lower()} is not read"
    kind = _format_of(file)
    return None if kind is None else f"is {kind}, and its name does not say so"


def _format_of(file: Path) -> str | None:
    """The format of an image by its first bytes."""
    try:
        if not S_ISREG(os.stat(file).st_mode):
            return None
        with open(file, "rb") as stream:
            start = stream.read(16)
    except OSError:
        return None
    return next((kind for kind, magic in _MAGIC.items() if re.match(magic, start, re.DOTALL)), None)
