"""Paths as people write them: with `~`, and in several spellings of one place."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> str:
    """The path with `~` and `~user` replaced by that user's folder; text without either is left as it is."""
    return os.path.expanduser(os.fspath(path))


def is_same_place(one: str, other: str) -> bool:
    """Whether two spellings name one file or folder: relative or absolute, through links, with a `/` at the end."""
    return os.path.realpath(expanded(one)) == os.path.realpath(expanded(other))


def folder_at(path: str | os.PathLike[str]) -> Path | None:
    """The folder of that name; None where there is none, as for the id of something on the Hub."""
    found = Path(expanded(path))
    return found if found.is_dir() else None
