"""A command on a terminal that is none, and what stands there in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm

_PIECE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


@dataclass(frozen=True)
class Session:
    """What a command did on a terminal.

    Attributes:
        code: Its exit code.
        raw: All that it wrote.
    """

    code: int
    raw: str

    @property
    def lines(self) -> list[str]:
        """What is to be read there in the end."""
        return screen(self.raw)

    @property
    def drawn(self) -> list[str]:
        """Every line that was to be read there at some time, bars in all their states."""
        return [piece for piece in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "\r", self.raw)) if piece]


def screen(raw: str) -> list[str]:
    """Lines that a terminal of endless height shows after some output: carriage returns, line ends, up, erase."""
    rows, row, column = [""], 0, 0
    for piece in _PIECE.finditer(raw):
        text = piece[0]
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif piece[2] == "A":
            row = max(row - int(piece[1] or 1), 0)
        elif piece[2] == "K":
            rows[row] = rows[row][:column]
        elif piece[2] is None:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in rows]


def run(
    command: Sequence[Any],
    folder: Path,
    *,
    columns: int = 160,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[str], str | None] | None = None,
    seconds: float = 200,
) -> Session:
    """Run a command with a terminal as its input, output and error output.

    Args:
        command: With its arguments.
        folder: To run it in.
        columns: Width of the terminal.
        environment: Added to that of this process.
        watch: Is given all output so far, and returns what is to be typed, if anything.
        seconds: After which it is killed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    env = {**os.environ, "TERM": "xterm", **(environment or {})}
    words = [*map(str, command)]
    child = warm.Popen(words, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    written, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                read = os.read(ours, 65536)
            except OSError:  # nobody has it open any more
                break
            if not read:
                break
            written += read
            typed = None if watch is None else watch(written.decode(errors="replace"))
            if typed:
                os.write(ours, typed.encode())
    else:
        child.kill()
    os.close(ours)
    return Session(child.wait(), written.decode(errors="replace").replace("\r\n", "\n"))
