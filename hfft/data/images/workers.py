"""A worker process of a DataLoader that was killed: recognized among other errors of the system, and explained."""

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

from hfft.errors import TrainingError, first_line

_NAMED = "DataLoader worker"  # how torch begins to tell of a dead one
_RAISED_THERE = "Caught "  # and of what a worker raised that lives
_SIGNS = (OSError, EOFError, pickle.UnpicklingError)  # of a pipe or socket whose other end is gone
_DYING = 1.0  # seconds, at most, between the ends of a process's connections


@contextmanager
def worker_deaths_explained(title: str, advice: str) -> Iterator[None]:
    """Raise a TrainingError, with a title and advice, in the place of torch's error for a worker that was killed."""
    try:
        with dead_workers_named():
            yield
    except RuntimeError as error:
        if _NAMED not in str(error):
            raise
        raise TrainingError(
            f"{title}: {first_line(error).rstrip('. ')}. A process that reads images died, most often for "
            f"lack of memory or of shared memory; {advice}"
        ) from error


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Raise torch's own error for a worker that was killed, whatever its end broke first.

    Depending on the moment, torch says that a worker was killed or exited, or a connection to it breaks.

    Raises:
        RuntimeError: `DataLoader worker (pid(s) N) exited unexpectedly`.
    """
    try:
        yield
    except _SIGNS as error:
        dead = [] if str(error).startswith(_RAISED_THERE) else _dead_workers(error)
        if not dead:
            raise
        raise RuntimeError(f"{_NAMED} (pid(s) {', '.join(map(str, dead))}) exited unexpectedly") from error


def _dead_workers(error: BaseException) -> list[int]:
    """Process numbers of dead workers of the DataLoader that an error came through."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        workers = getattr(frame.f_locals.get("self"), "_workers", ())
        if workers and frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            ended = wait([worker.sentinel for worker in workers], _DYING)
            return [worker.pid for worker in workers if worker.sentinel in ended]
    return []
