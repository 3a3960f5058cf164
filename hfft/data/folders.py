"""A folder's files, and what their names tell: images, tables and splits; opens none of them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.data.formats import endings
from hfft.errors import DataError

# Names under which folders and data sets on the Hub keep a split, by the name used here.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")  # as imagefolder of datasets has them
# Endings of images that are not read, or with a plugin only.
UNREAD = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".nef", ".orf", ".raw", ".rw2"),
        *(".exr", ".heic", ".heif", ".jxl", ".svg", ".eps", ".qoi", ".sgi", ".fits", ".wmf", ".emf"),
    )
)
# How `Dataset.push_to_hub` names files; the split may have any name.
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
_LOG = get_logger(__name__)


def image_files(folder: Path) -> list[Path]:
    """Files at any depth below a folder that are called like images; hidden files and folders are left out."""
    return sorted(filter(is_image, visible_files(folder)))


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder when every one of them is called like a split and holds folders, else itself as train.

    Raises:
        DataError: If some look like splits and others don't: class folders would become images of a class `train`.
    """
    known = [name for names in SPLIT_NAMES.values() for name in names]
    children = subfolders(folder)
    splits = [path for path in children if path.name.lower() in known and subfolders(path)]
    if splits and len(splits) == len(children):
        return {path.name: path for path in children}
    without_images = [path.name for path in splits if path not in {file.parent for file in image_files(path)}]
    if without_images:
        others = [path.name for path in children if path not in splits]
        raise DataError(
            f"{folder}: {', '.join(without_images)} look like splits and {', '.join(others)} do not; allowed: class "
            f"folders alone, or folders of class folders that are called {', '.join(known)}"
        )
    return {"train": folder}


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder; hidden ones and those that begin with two underscores are left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def table_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """Files with these endings in a folder or below, hidden ones left out; none when the folder holds an image."""
    if any(map(is_image, visible_files(folder))):
        return []
    return sorted(path for path in visible_files(folder) if path.suffix.lower() in endings)


def metadata_files(folder: Path) -> list[Path]:
    """The tables called `metadata` that lie beside images: in the folder, or in its split folders."""
    known = [name for names in SPLIT_NAMES.values() for name in names]
    places = [folder, *(path for path in subfolders(folder) if path.name.lower() in known)]
    return [place / name for place in places for name in METADATA if (place / name).is_file()]


def splits_of(folder: Path, tables: Collection[Path]) -> dict[str, list[Path]]:
    """Splits that the names of files tell: by a word in a folder's name, else in the file's.

    These are the rules of datasets 5.2 (data_files.py), in any case of letters.

    Args:
        folder: Names above it tell nothing.
        tables: Files below it: tables or shards.

    Returns:
        Split name to files; all files are `train` when no name has a split's word.
    """
    splits: dict[str, list[Path]] = defaultdict(list)
    nameless = []
    for table in tables:
        path = table.relative_to(folder)
        shard = _SHARD.fullmatch(path.as_posix())
        split = shard[1] if shard else _split_in(path.parent.as_posix()) or _split_in(path.name)
        if split is None:
            nameless.append(table)
        else:
            splits[split].append(table)
    if not splits:
        return {"train": nameless}
    if nameless:
        shown = ", ".join(path.relative_to(folder).as_posix() for path in nameless[:3])
        _warn(f"{folder}: left out {len(nameless)} of {len(tables)} files, whose names tell no split: {shown}")
    return dict(splits)


def warn_of_left_out(folder: Path, splits: Collection[Path]) -> None:
    """Count the files that are images, as far as their names tell, and become no row; warn once if there are any.

    Args:
        folder: Holds the class folders, or the split folders.
        splits: The folders of class folders: `folder` itself, or its split folders.
    """
    beside = [file for path in {folder, *splits} for file in path.iterdir() if file.is_file() and file.name[0] != "."]
    within = (file for path in splits for child in subfolders(path) for file in visible_files(child))
    found = Counter(file.suffix.lower() for file in (*beside, *within) if not is_image(file))
    unread = {ending: count for ending, count in sorted(found.items()) if ending in UNREAD}
    loose = sum(map(is_image, beside))
    parts = []
    if unread:
        total = sum(unread.values())
        files = "1 file that is not read as an image" if total == 1 else f"{total} files that are not read as images"
        parts.append(f"{files} ({', '.join(f'{ending} {count}' for ending, count in unread.items())})")
    if loose:
        parts.append(f"{loose} {'image' if loose == 1 else 'images'} beside the class folders")
    if parts:
        _warn(f"{folder}: left out {' and '.join(parts)}")


def is_image(path: Path) -> bool:
    """Whether a file is called like an image that is read here."""
    return path.suffix.lower() in endings()


def visible_files(folder: Path) -> Iterator[Path]:
    """Files at any depth below a folder, hidden ones left out, in no order."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(parent, name) for name in names if name[0] != ".")


def _split_in(text: str) -> str | None:
    words = re.split("[-._ 0-9/]+", text.lower())
    return next((split for split, names in SPLIT_NAMES.items() if not set(names).isdisjoint(words)), None)


def _warn(message: str) -> None:
    PartialState()  # the logger asks it which process this is
    _LOG.warning(message)
