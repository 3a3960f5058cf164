"""Text that somebody else wrote, such as the name of a file or a class, as any console, page or file takes it."""

import os
import re
from collections.abc import Sequence

# Control characters, line and paragraph breaks, what turns the direction of writing, and bytes of names that are no
# UTF-8, which Python keeps as halves of a pair.
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with each character that no console should see as an escape, such as `\x1b`, but those to `keep`."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else _escape(ord(found[0])), text)


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first ones, and dots where there are more."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as `os.fsdecode` keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def path_text(path: str | bytes | os.PathLike[str]) -> str:
    """A path as text of UTF-8, whatever the system's encoding; other bytes as `os.fsdecode` keeps them."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def printable_path(path: str | bytes | os.PathLike[str]) -> str:
    """A path as any console takes it."""
    return printable(path_text(path))
