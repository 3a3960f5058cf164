"""Paths as people write them; files and folders that are whole or absent: written aside, flushed, then renamed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def write_text(path: Path, text: str) -> None:
    """Write a text file; a reader sees the old content or the new one, never a part."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def recall(path: Path | None) -> dict[str, Any]:
    """What `remember` has put into a file; empty where there is none that can be read."""
    try:
        content = read_json(path) if path else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remember(path: Path, key: str, value: Any) -> None:
    """Put a value into a JSON file of such values, for later runs; OSError where it can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**recall(path), key: value})


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file at a temporary path, then put it in place."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        write(aside)
        _flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary folder, then put it in place of the old one, if any."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    publish_folder(aside, folder)


def publish_folder(aside: Path, folder: Path) -> None:
    """Flush a complete folder to disk and rename it; an older folder of that name is replaced."""
    for path in sorted(aside.rglob("*")):
        _flush(path)
    _flush(aside)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
