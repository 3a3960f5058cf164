"""What the command line prints: lines, tables, metrics."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_UNBROKEN = 2**16  # columns of a table that no terminal shows


def say(line: str) -> None:
    """Print to stderr, in one of the processes of a launch."""
    if "RANK" in os.environ:
        from hfft.liveness import may_speak  # and torch with it

        if not may_speak():
            return
    print(line, file=sys.stderr)


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

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:  # whoever reads it cuts lines as they like
        console = Console(width=_UNBROKEN)
    console.print(table)


def spaced(names: Iterable[str]) -> list[str]:
    """Names of metrics in words."""
    return [name.replace("_", " ") for name in names]


def interval(row: dict[str, Any], sign: str = "") -> str:
    """A value with the ends of its interval."""
    return f"{row['value']:{sign}.4f} ({between(row, sign)})"


def between(row: dict[str, Any], sign: str = "") -> str:
    """The ends of an interval, which are None where there are too few images to say."""
    return "too few images" if row["low"] is None else f"{row['low']:{sign}.4f} to {row['high']:{sign}.4f}"
