"""Files of a folder, found by their endings; opens none of them."""

import os
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from hfft.data.images.formats import formats
from hfft.errors import DataError
from hfft.recipe.loading import RECIPE
from hfft.runs.record import ENVIRONMENT, SUMMARY

# Endings of images that are not read, or with a plugin only.
UNREAD = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".nef", ".orf", ".raw", ".rw2"),
        *(".exr", ".heic", ".heif", ".jxl", ".svg", ".eps", ".qoi", ".sgi", ".fits", ".wmf", ".emf"),
    )
)
_OUTPUT = (  # files of a run, of a cross-validation, of a model
    (RECIPE, ENVIRONMENT),
    (SUMMARY, f"fold-0/{RECIPE}"),
    ("config.json", "preprocessor_config.json"),
)


@cache
def endings() -> dict[str, str]:
    """Endings of image files that are read, in small letters and with their dot, to the format that they promise."""
    read = formats()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in read}


def is_image_file(path: Path) -> bool:
    """Whether a file is called like an image that is read here."""
    return path.suffix.lower() in endings()


def image_files(folder: Path) -> list[Path]:
    """Files at any depth below a folder that are called like images; hidden files and folders are left out."""
    return sorted(filter(is_image_file, visible_files(folder)))


def files_ending(folder: Path, endings: Collection[str]) -> list[Path]:
    """Files at any depth below a folder with these endings, in any case; hidden ones are left out."""
    return sorted(path for path in visible_files(folder) if path.suffix.lower() in endings)


def holds_images(folder: Path) -> bool:
    """Whether an image lies in a folder, at any depth."""
    return any(map(is_image_file, visible_files(folder)))


def holds_loose_images(folder: Path) -> bool:
    """Whether an image lies directly in a folder."""
    return any(is_image_file(path) and path.is_file() and path.name[0] != "." for path in folder.iterdir())


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


def visible_files(folder: Path) -> Iterator[Path]:
    """Files at any depth below a folder, in no order; links are followed.

    Hidden files and folders are left out, and so are run folders.

    Raises:
        DataError: If a folder can't be listed.
    """
    return _files_below(folder, frozenset(map(_identity, Path(folder).resolve().parents)))


def _files_below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        above = above | {_identity(folder)}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if _is_folder(entry):
                    child = Path(folder, entry.name)
                    # Neither a link to a folder that it lies in, nor a run.
                    if not (_identity(child) in above or is_output(child)):
                        yield from _files_below(child, above)
                else:
                    yield Path(folder, entry.name)
    except OSError as error:
        raise DataError(f"{folder}: the folder can't be read: {error.strerror or error}") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; asks the file system about links alone."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def is_output(folder: Path) -> bool:
    """Whether a folder is a run's, a cross-validation's, or a model."""
    return any(all((folder / name).is_file() for name in names) for names in _OUTPUT)


def _holds_output(folder: Path) -> bool:
    """Whether a folder is a run's, or holds runs and no images: hfft's output, never a class."""
    if is_output(folder):
        return True
    return not holds_images(folder) and any(is_output(Path(parent)) for parent, _, _ in os.walk(folder))
