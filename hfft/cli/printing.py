"""What the command line prints: lines, tables, metrics."""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from hfft.errors import HfftError
from hfft.system.text import printable

_UNBROKEN = 2**16  # columns of a table that no terminal shows


class ConsoleError(HfftError):
    """A standard stream that can't be written."""

    exit_code = 1


def open_console() -> None:
    """Make the standard streams take any text, whatever their encoding, and be there even where they were closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor, which this takes, was closed before this process began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="backslashreplace")
        elif isinstance(stream, io.TextIOWrapper):  # names of files, as the system has them
            stream.reconfigure(encoding=sys.getfilesystemencoding(), errors="surrogateescape")


def say(line: str) -> None:
    """Print to stderr, in one of the processes of a launch."""
    if "RANK" in os.environ:
        from hfft.system.liveness import may_speak  # and torch with it

        if not may_speak():
            return
    try:
        print(printable(line, keep="\n"), file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere(sys.stderr)


def show(line: str = "") -> None:
    """Print to stdout; names in it as any console takes them."""
    _put(printable(line, keep="\n") + "\n")


def _put(text: str) -> None:
    with reader_may_leave():
        try:
            sys.stdout.write(text)
            sys.stdout.flush()  # so that what goes wrong is known here
        except BrokenPipeError:
            raise
        except OSError as error:
            _write_nowhere(sys.stdout)
            raise ConsoleError(f"standard output can't be written: {error.strerror or error}") from error


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print nothing any more once whoever reads the standard output has enough, as `head` does; the verb goes on."""
    try:
        yield
    except BrokenPipeError:
        _write_nowhere(sys.stdout)


def _write_nowhere(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for Python's own flush at the end, too


def print_metrics(metrics: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Metrics by split, with their intervals."""
    rows = [
        (split, name.replace("_", " "), f"{values['value']:.4f}", between(values))
        for split, by_name in metrics.items()
        for name, values in by_name.items()
    ]
    print_table(("", "metric", "value", "95 % interval"), rows)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table; as wide as it is where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(Text(printable(name)))
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    terminal, text = Console(), io.StringIO()
    is_shown = terminal.is_terminal  # else whoever reads it cuts lines as they like
    Console(file=text, force_terminal=is_shown, width=terminal.width if is_shown else _UNBROKEN).print(table)
    _put(text.getvalue())


def spaced(names: Iterable[str]) -> list[str]:
    """Names of metrics in words."""
    return [name.replace("_", " ") for name in names]


def interval(row: dict[str, Any], sign: str = "") -> str:
    """A value with the ends of its interval."""
    return f"{row['value']:{sign}.4f} ({between(row, sign)})"


def between(row: dict[str, Any], sign: str = "") -> str:
    """The ends of an interval, which are None where there are too few images to say."""
    return "too few images" if row["low"] is None else f"{row['low']:{sign}.4f} to {row['high']:{sign}.4f}"
