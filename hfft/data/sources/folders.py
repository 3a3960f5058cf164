"""A folder's files, and what their names tell: images, tables and splits; opens none of them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from hfft.data.images.formats import formats
from hfft.errors import DataError
from hfft.system.messages import warn

# Names under which folders and data sets on the Hub keep a split, by the name used here.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = tuple(name for names in SPLIT_NAMES.values() for name in names)
# Endings of images that are not read, or with a plugin only.
UNREAD = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".nef", ".orf", ".raw", ".rw2"),
        *(".exr", ".heic", ".heif", ".jxl", ".svg", ".eps", ".qoi", ".sgi", ".fits", ".wmf", ".emf"),
    )
)
_NOT_SAID = ("__MACOSX", "__pycache__")  # folders that nobody takes for a class
# How `Dataset.push_to_hub` names files; the split may have any name.
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
# `trainset` and its like: two words in one.
_JOINED = re.compile(rf"^({'|'.join(SPLIT_WORDS)})(sets?|data|images?|imgs?|files?)$")


@cache
def endings() -> dict[str, str]:
    """Endings of image files that are read, in small letters and with their dot, to the format that they promise."""
    read = formats()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in read}


def image_files(folder: Path) -> list[Path]:
    """Files at any depth below a folder that are called like images; hidden files and folders are left out."""
    return sorted(filter(is_image, visible_files(folder)))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder; hidden ones, those that begin with two underscores and those of runs are left out."""
    return [path for path in _children(folder) if not _holds_output(path)]


def filled_subfolders(folder: Path) -> list[Path]:
    """Those of `subfolders` that hold images."""
    return [path for path in _children(folder) if holds_images(path) and not is_output(path)]


def _children(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if not entry.name.startswith((".", "__")) and _is_folder(entry)]
    return [Path(folder, name) for name in sorted(found)]


def holds_images(folder: Path) -> bool:
    """Whether an image lies in a folder, at any depth."""
    return any(map(is_image, visible_files(folder)))


def words_of(name: str) -> list[str]:
    """The words of a file's or folder's name, in small letters: `01_trainImages` holds `train` and `images`."""
    words = re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return [part for word in words if word for part in _JOINED.sub(r"\1 \2", word).split()]


def split_in(name: str) -> str | None:
    """The split that a name has a word of: `train`, `validation`, `test`, or None.

    These are the rules of datasets 5.2 (data_files.py), in any case of letters; and `trainset`, `TestImages`.
    """
    words = set(words_of(name))
    return next((split for split, names in SPLIT_NAMES.items() if not words.isdisjoint(names)), None)


def table_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """Files with these endings in a folder or below, hidden ones left out."""
    return sorted(path for path in visible_files(folder) if path.suffix.lower() in endings)


def splits_of(folder: Path, tables: Collection[Path]) -> dict[str, list[Path]]:
    """Splits that the names of files tell: by a word in a folder's name, else in the file's.

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
        split = shard[1] if shard else split_in(path.parent.as_posix()) or split_in(path.stem)
        if split is None:
            nameless.append(table)
        else:
            splits[split].append(table)
    if not splits:
        return {"train": nameless}
    if nameless:
        shown = ", ".join(path.relative_to(folder).as_posix() for path in nameless[:3])
        warn(f"{folder}: left out {len(nameless)} of {len(tables)} files, whose names tell no split: {shown}")
    return dict(splits)


def files_of(folder: Path, splits: Collection[Path]) -> tuple[list[Path], Iterator[Path]]:
    """Files beside the class folders of a folder with these roots, and those within them."""
    beside = [file for path in {folder, *splits} for file in path.iterdir() if file.is_file() and file.name[0] != "."]
    return beside, (file for path in splits for child in subfolders(path) for file in visible_files(child))


def warn_of_left_out(folder: Path, splits: Collection[Path]) -> None:
    """Count the files that are images, as far as their names tell, and become no row; warn once if there are any.

    Args:
        folder: Holds the class folders, or the split folders.
        splits: The folders of class folders: `folder` itself, or its split folders.
    """
    beside, within = files_of(folder, splits)
    found = Counter(file.suffix.lower() for file in (*beside, *within) if not is_image(file))
    aside = [
        path.name for folder in splits for path in folder.glob("__*") if path.name not in _NOT_SAID and path.is_dir()
    ]
    unread = {ending: count for ending, count in sorted(found.items()) if ending in UNREAD}
    loose = sum(map(is_image, beside))
    parts = []
    if unread:
        total = sum(unread.values())
        files = "1 file that is not read as an image" if total == 1 else f"{total} files that are not read as images"
        parts.append(f"{files} ({', '.join(f'{ending} {count}' for ending, count in unread.items())})")
    if loose:
        parts.append(f"{loose} {'image' if loose == 1 else 'images'} beside the class folders")
    if aside:
        parts.append(f"folders whose names begin with two underscores ({', '.join(sorted(aside))})")
    if parts:
        warn(f"{folder}: left out {' and '.join(parts)}")


def is_image(path: Path) -> bool:
    """Whether a file is called like an image that is read here."""
    return path.suffix.lower() in endings()


def visible_files(folder: Path) -> Iterator[Path]:
    """Files at any depth below a folder, in no order; links are followed.

    Hidden files and folders are left out, and so are run folders.

    Raises:
        DataError: If a folder can't be listed.
    """
    return _files_below(folder, frozenset(map(_place, Path(folder).resolve().parents)))


def _files_below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        above = above | {_place(folder)}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if _is_folder(entry):
                    child = Path(folder, entry.name)
                    if not (_place(child) in above or is_output(child)):  # a link to a folder that it lies in; a run
                        yield from _files_below(child, above)
                else:
                    yield Path(folder, entry.name)
    except OSError as error:
        raise DataError(f"{folder}: the folder can't be read: {error.strerror or error}") from error


def _place(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; asks the file system about links alone."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def is_output(folder: Path) -> bool:
    """Whether a folder is a run's, a cross-validation's, or a model."""
    runs = (
        ("recipe.yaml", "environment.json"),
        ("summary.json", "fold-0/recipe.yaml"),
        ("config.json", "preprocessor_config.json"),
    )
    return any(all((folder / name).is_file() for name in names) for names in runs)


def _holds_output(folder: Path) -> bool:
    """Whether a folder is a run's, or holds runs and no images beside them: hfft's output, never a class."""
    if is_output(folder):
        return True
    return not holds_images(folder) and any(is_output(Path(parent)) for parent, _, _ in os.walk(folder))
