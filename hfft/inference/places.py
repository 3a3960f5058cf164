"""Folders to write into, and the names of what is in them."""

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from hfft.errors import DataError
from hfft.runs.record import ADAPTER, MODEL, RunRecord


def check_folder(folder: Path, option: str, ours: Collection[str], *, overwrite: bool) -> Path:
    """Find out before any work whether a folder can be written whole, and lose nothing that somebody else put there.

    Args:
        folder: What is to be written.
        option: Of the command line, for messages.
        ours: Patterns of all files that are ever written into such a folder.
        overwrite: Whether an earlier one is replaced.

    Returns:
        The folder itself, where a link was given.

    Raises:
        DataError: If it can't.
    """
    where, folder = f"{option} {folder}", folder.resolve()
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise DataError(f"{where}: is the folder that you are in, or holds it; give another one")
    if folder.is_dir():
        strange = (name for name in _inside(folder) if not any(fnmatch(name, pattern) for pattern in ours))
        others = sorted(islice(strange, 3))
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


def _inside(folder: Path) -> Iterator[str]:
    """Files and links at any depth."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def name_of(source: str) -> str:
    """What a run, a model folder or a repository on the Hub is called."""
    if not Path(source).is_dir():
        return source.rpartition("/")[2]
    folder = Path(source).resolve()
    is_result = folder.name in (MODEL, ADAPTER) and RunRecord(folder.parent).is_run
    return folder.parent.name if is_result else folder.name
