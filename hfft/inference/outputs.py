"""Files and folders that users name for a command to write: checked before any work, written whole or not at all."""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from hfft.errors import DataError, HfftError
from hfft.system.files import write_file, write_folder

_OWN_IMPORT = re.compile(r"^from (hfft[\w.]*) import .+\n", re.MULTILINE)


class WritingError(HfftError):
    """A file or folder that can't be written when everything else is done."""

    exit_code = 1


def check_output_file(file: Path, option: str = "--output", endings: Collection[str] = ()) -> None:
    """Check that a file can be written, and has one of the endings, if any are given; DataError if not."""
    where, folder = f"{option} {file}", file.absolute().parent
    if file.is_dir():
        raise DataError(f"{where}: is a folder; give the name of a file")
    if not folder.is_dir():
        raise DataError(f"{where}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise DataError(f"{where}: no file can be made in {folder}")
    if endings and file.suffix.lower() not in endings:
        raise DataError(f"{where}: allowed: a name that ends in {' or '.join(endings)}")


def check_output_folder(folder: Path, option: str, own_files: Collection[str], *, overwrite: bool) -> Path:
    """Resolve a folder, and check that it can be written or replaced without the loss of anybody else's files.

    `own_files` are patterns of all files that the command ever writes into such a folder, `option` is that of the
    command line.

    Raises:
        DataError: If it can't.
    """
    where, folder = f"{option} {folder}", folder.resolve()
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise DataError(f"{where}: is the folder that you are in, or holds it; give another one")
    if folder.is_dir():
        foreign = (name for name in _files_in(folder) if not any(fnmatch(name, own) for own in own_files))
        others = sorted(islice(foreign, 3))
        if others:
            raise DataError(f"{where}: holds {', '.join(others)}, which would be lost; give another folder")
        if any(folder.iterdir()) and not overwrite:
            raise DataError(f"{where}: is there already; --overwrite replaces it")
    elif folder.exists():
        raise DataError(f"{where}: is a file; give the name of a folder")
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(f"{where}: no folder can be made in {parent}")
    return folder


def _files_in(folder: Path) -> Iterator[str]:
    """Files and links at any depth."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def write_output_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file of `--output` at a temporary path, then put it in place; WritingError if it can't."""
    _write(f"--output {file}", lambda: write_file(file, write))


def write_output_folder(folder: Path, option: str, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary folder, then put it in place of the old one; WritingError if it can't."""
    _write(f"{option} {folder}", lambda: write_folder(folder, write))


def _write(where: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise WritingError(f"{where}: can't be written: {error.strerror or error}") from error


def source_without_hfft(module: ModuleType) -> str:
    """The module's source, with the source of each hfft module that it imports in the place of the import."""
    return _OWN_IMPORT.sub(
        lambda found: source_without_hfft(importlib.import_module(found[1])), inspect.getsource(module)
    )
