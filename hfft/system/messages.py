"""What is said of the data, by the main process alone; `hfft check-data` keeps its warnings."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate import PartialState
from accelerate.logging import get_logger

_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)
_LOG = get_logger(__name__)


def say(message: str) -> None:
    """Log a line."""
    PartialState()  # the logger asks it which process this is
    _LOG.info(message)


def warn(message: str) -> None:
    """Log a warning."""
    PartialState()
    _LOG.warning(message)
    kept = _kept.get()
    if kept is not None:
        kept.append(message)


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """A list that fills with what `warn` says meanwhile."""
    kept: list[str] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
