"""The bytes of an image, wherever a row says they are: in the row, in a file, or in a part of a file."""

import os
import re
from stat import S_ISREG
from typing import Any

from hfft.system.text import path_text, printable, printable_path

_PART = re.compile(rb"(.*)\?(\d+)\+(\d+)", re.DOTALL)
# Bytes of names that are no UTF-8, which Python keeps as halves of a pair and Arrow refuses, as private characters.
_STORED = {0xDC80 + byte: 0x10FF80 + byte for byte in range(128)}
_OPENED = {stored: byte for byte, stored in _STORED.items()}


def stored_path(text: str) -> str:
    """A path, as `path_text` has it, as text that a table takes and `read_content` opens."""
    return text.translate(_STORED)


def opened_path(stored: str) -> bytes:
    """The path as the system has it, which holds private characters itself if there is such a file."""
    plain, opened = stored.encode(), stored.translate(_OPENED).encode("utf-8", "surrogateescape")
    return plain if plain == opened or os.path.lexists(plain) else opened


def shown_path(stored: str) -> str:
    """A stored path as any console takes it."""
    return printable(stored.translate(_OPENED))


def part_of(file: str | os.PathLike[str], offset: int, size: int) -> str:
    """The name of a part of a file, which `read_content` reads."""
    return f"{stored_path(path_text(file))}?{offset}+{size}"


def read_file(path: str | bytes | os.PathLike[str]) -> bytes:
    """The content of a regular file; one of another kind, such as a named pipe, could keep its reader waiting.

    Raises:
        OSError: If it can't be read.
    """
    if not S_ISREG(os.stat(path).st_mode):
        raise OSError("is no regular file")
    with open(path, "rb") as stream:
        return stream.read()


def read_content(image: dict[str, Any]) -> bytes:
    """Encoded bytes of an image.

    Args:
        image: `bytes`, or where they are None, the `path` of a file or, from `part_of`, of a part of one.

    Raises:
        OSError: If the file can't be read.
    """
    if image["bytes"] is not None:
        return image["bytes"]
    path = opened_path(image["path"])
    part = _PART.fullmatch(path)
    if part is None or os.path.lexists(path):
        return read_file(path)
    with open(part[1], "rb") as stream:
        stream.seek(int(part[2]))
        content = stream.read(int(part[3]))
    if len(content) < int(part[3]):
        raise OSError(f"{printable_path(part[1])} ends in the middle of the image")
    return content
