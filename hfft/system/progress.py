"""Progress bars: tqdm's own, on a terminal that somebody watches, in the main process; and what steps took."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

SOON = 3.0  # seconds; what takes less needs no bar

_are_off = False


class _Bar(tqdm):
    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the line once its delay is over; tqdm's `external_write_mode` and `refresh` draw it before."""
        if self.delay <= 0 or time.time() - self.start_t >= self.delay:  # by tqdm's own clock
            super().display(msg, pos)


def bar(
    title: str,
    total: int | None,
    items: Iterable[Any] | None = None,
    *,
    unit: str = "images",
    delay: float = 0.0,
    shown: bool | None = None,
) -> tqdm:
    """A bar over items, or one that is moved by `update`, in the main process; `shown` when None on a terminal."""
    hidden = None if shown is None else not shown
    if _are_off or os.environ.get("RANK", "0") != "0":
        hidden = True
    return _Bar(items, title, total, unit=unit, delay=delay, disable=hidden, dynamic_ncols=True, smoothing=0)


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Switch all bars on or off for a while; off wins where calls are nested."""
    global _are_off
    before, _are_off = _are_off, _are_off or not shown
    try:
        yield
    finally:
        _are_off = before


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add the seconds that something takes to those of its step."""
    begun = time.monotonic()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.monotonic() - begun


@contextmanager
def above_bars() -> Iterator[None]:
    """Let lines be written to the standard error output; bars are drawn again below them."""
    with tqdm.external_write_mode(sys.stderr):
        yield


def close_bars() -> None:
    """Leave unfinished bars as they are, each on a line of its own."""
    for open_bar in list(tqdm._instances):  # pyright: ignore[reportAttributeAccessIssue]
        open_bar.close()
