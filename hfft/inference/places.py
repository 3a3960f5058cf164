"""Folders to write into, and the names of what is in them."""

import os
from collections.abc import Collection
from pathlib import Path

from hfft.errors import DataError


def check_folder(folder: Path, option: str, ours: Collection[str], *, overwrite: bool) -> None:
    """Find out before any work whether a folder can be written whole, and lose nothing that somebody else put there.

    Args:
        folder: What is to be written.
        option: Of the command line, for messages.
        ours: Names of all that is ever written into such a folder.
        overwrite: Whether an earlier one is replaced.

    Raises:
        DataError: If it can't.
    """
    where = f"{option} {folder}"
    if folder.is_dir():
        others = sorted({path.name for path in folder.iterdir()} - set(ours))
        if others:
            raise DataError(f"{where}: holds {', '.join(others[:3])}, which would be lost; give another folder")
        if any(folder.iterdir()) and not overwrite:
            raise DataError(f"{where}: is there already; --overwrite replaces it")
    elif folder.exists():
        raise DataError(f"{where}: is a file; give the name of a folder")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(f"{where}: no folder can be made in {parent}")


def name_of(source: str) -> str:
    """What a run, a model folder or a repository on the Hub is called."""
    if not Path(source).is_dir():
        return source.rpartition("/")[2]
    folder = Path(source).resolve()
    is_result = folder.name in ("model", "adapter") and (folder.parent / "recipe.yaml").is_file()
    return folder.parent.name if is_result else folder.name
