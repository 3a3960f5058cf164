"""Progress bars: one style for all that takes long, on a terminal that somebody watches, in the main process."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

SOON = 3.0  # seconds; what takes less needs no bar

_FORMAT = "{desc} |{bar}| {percentage:3.0f} %{told}"
_FORMAT_WITHOUT_END = "{desc} {n_fmt}{told}"

_are_off = False


class Bar(tqdm):
    """What is done, how fast, what is known of it by now, and the time that is left.

    Attributes:
        speed: In words; that since the bar's begin when None.
        facts: What else is known, in words.
        after: Seconds that more work will take after the bar's end; None where nobody knows.
    """

    speed: str | None = None
    facts: tuple[str, ...] = ()
    after: Callable[[], float | None] | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the line, once it is time for it."""
        if self.delay <= 0 or time.time() - self.start_t >= self.delay:  # by tqdm's own clock
            super().display(msg, pos)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the line is made of."""
        found = super().format_dict
        done, seconds = self.n - self.initial, found["elapsed"]
        rate = done / seconds if done > 0 and seconds > 0 else None
        told = [] if rate is None else [self.speed or _speed(rate, self.unit)]
        told += self.facts
        if rate is not None and self.total is not None:
            left = max(self.total - self.n, 0) / rate
            told += [f"{self.format_interval(left)} left"] if left > 0 else []
            after = None if self.after is None else self.after()
            told += [] if after is None else [f"run {about(left + after)}"]
        return {**found, "told": "".join(f", {part}" for part in told)}


def bar(
    title: str,
    total: int | None,
    items: Iterable[Any] | None = None,
    *,
    unit: str = "images",
    delay: float = 0.0,
    shown: bool | None = None,
) -> Bar:
    """A bar over items, or one that is moved by `update`; hidden where nobody watches a terminal.

    Args:
        title: What is done.
        total: How many units that is; None where nobody knows.
        items: What is gone through, one unit each.
        unit: In the plural.
        delay: Seconds before it appears.
        shown: Whether to show it, in the main process; None is on a terminal.
    """
    hidden = None if shown is None else not shown
    if _are_off or os.environ.get("RANK", "0") != "0":
        hidden = True
    form = _FORMAT if total else _FORMAT_WITHOUT_END
    return Bar(
        items, title, total, unit=unit, delay=delay, disable=hidden, dynamic_ncols=True, smoothing=0, bar_format=form
    )


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Whether there are bars at all inside."""
    global _are_off
    before, _are_off = _are_off, _are_off or not shown
    try:
        yield
    finally:
        _are_off = before


@contextmanager
def above_bars() -> Iterator[None]:
    """Let lines be written to the standard error output: bars make room, and stand below them again."""
    with tqdm.external_write_mode(sys.stderr):
        yield


def close_bars() -> None:
    """Leave bars where they are, each on a line of its own: what was under way has ended before its end."""
    for open_bar in list(tqdm._instances):  # pyright: ignore[reportAttributeAccessIssue]
        open_bar.close()


def about(seconds: float) -> str:
    """A duration that is not known well: `about 40 s`, `about 12 min`, `about 2.5 h`."""
    if seconds < 95:
        return f"about {max(round(seconds / 10), 1) * 10} s"
    if seconds < 95 * 60:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def _speed(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"
