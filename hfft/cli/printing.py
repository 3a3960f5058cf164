"""What the command line prints: lines, tables, metrics."""

import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from hfft.errors import HfftError
from hfft.system.text import printable

_UNLIMITED = 2**16  # columns of a table that no terminal shows


class ConsoleError(HfftError):
    """A standard stream that can't be written."""

    exit_code = 1


def is_main_process() -> bool:
    """Whether this process of a launch is the one that prints results."""
    return os.environ.get("RANK", "0") == "0"


def values_of(arguments: Namespace, *names: str) -> dict[str, Any]:
    """Options that are passed on under their names."""
    return {name: getattr(arguments, name) for name in names}


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


def print_error(line: str) -> None:
    """Print to stderr, in one of the processes of a launch."""
    if "RANK" in os.environ:
        from hfft.system.liveness import may_speak  # and torch with it

        if not may_speak():
            return
    try:
        print(printable(line, keep="\n"), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def print_line(line: str = "") -> None:
    """Print to stdout; names in it as any console takes them."""
    _print_text(printable(line, keep="\n") + "\n")


def print_json(**content: Any) -> None:
    """Print to stdout, as one line of JSON."""
    print_line(json.dumps(content))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table, of the terminal's width, or of unlimited width where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(Text(printable(name)))
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    terminal, text = Console(), io.StringIO()
    width = terminal.width if terminal.is_terminal else _UNLIMITED
    Console(file=text, force_terminal=terminal.is_terminal, width=width).print(table)
    _print_text(text.getvalue())


def print_metrics(metrics: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Metrics by split, with their intervals."""
    rows = [
        (split, in_words(name), f"{values['value']:.4f}", format_bounds(values))
        for split, by_name in metrics.items()
        for name, values in by_name.items()
    ]
    print_table(("", "metric", "value", "95 % interval"), rows)


def in_words(metric: str) -> str:
    """The name of a metric for people."""
    return metric.replace("_", " ")


def format_interval(row: dict[str, Any], sign: str = "") -> str:
    """A value with the bounds of its interval."""
    return f"{row['value']:{sign}.4f} ({format_bounds(row, sign)})"


def format_bounds(row: dict[str, Any], sign: str = "") -> str:
    """The bounds of an interval, which are None where there are too few images to say."""
    return "too few images" if row["low"] is None else f"{row['low']:{sign}.4f} to {row['high']:{sign}.4f}"


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print nothing any more once the reader of stdout has closed it, as `head` does; the verb goes on."""
    try:
        yield
    except BrokenPipeError:
        _discard(sys.stdout)


def _print_text(text: str) -> None:
    with reader_may_leave():
        try:
            sys.stdout.write(text)
            sys.stdout.flush()  # so that an error is raised here
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard(sys.stdout)
            raise ConsoleError(f"standard output can't be written: {error.strerror or error}") from error


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for Python's own flush at the end, too
