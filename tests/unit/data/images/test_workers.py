"""A worker of a DataLoader that was killed is named, whatever its end broke first; what it raised stays what it is."""

import multiprocessing
import sys
import time

import pytest
import warm

from hfft.data.images.workers import dead_workers_named
from hfft.errors import TrainingError
from hfft.training.failures import failures_explained

DIES = """
import os, signal, sys
from torch.utils.data import DataLoader
from hfft.errors import TrainingError
from hfft.training.failures import failures_explained

class Rows(list):
    def __getitem__(self, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

try:
    with failures_explained("phase 1/2 head"):
        list(DataLoader(Rows(range(8)), num_workers=2))
except TrainingError as error:
    print(error)
    sys.stdout.flush()
    os._exit(3)
"""


def test_a_killed_worker_is_named_with_its_advice():
    """In a process of its own: torch raises at any place there, as soon as a worker dies."""
    done = warm.run([sys.executable, "-c", DIES])
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("phase 1/2 head: DataLoader worker (pid")
    assert "fewer dataloader_num_workers need less, and the same command continues" in done.stdout


class Batches:
    """A DataLoader's iterator, of which the first worker dies while its batch is fetched."""

    def __init__(self, error, *, dies):
        fork = multiprocessing.get_context("fork")
        self._workers = [fork.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
        for worker in self._workers:
            worker.start()
        self._error, self._dies = error, dies

    def broken(self):
        if self._dies:
            self._workers[0].kill()
        raise self._error

    exec(
        compile("def get(self):\n    self.broken()", "dataloader.py", "exec"),
        as_torch := {"__name__": "torch.utils.data.dataloader"},
    )
    get = as_torch["get"]

    def end(self):
        for worker in self._workers:
            worker.kill()
            worker.join()


SIGNS = [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "No such file")]


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: type(sign).__name__)
def test_a_broken_connection_to_a_killed_worker_is_named_too(sign):
    batches = Batches(sign, dies=True)
    try:
        number = batches._workers[0].pid
        with (
            pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid\(s\) {number}\) exited"),
            dead_workers_named(),
        ):
            batches.get()
        with pytest.raises(TrainingError, match="phase: DataLoader worker"), failures_explained("phase"):
            batches.get()
    finally:
        batches.end()


@pytest.mark.parametrize(
    ("error", "dies"),
    [
        (OSError("Caught OSError in DataLoader worker process 0.\n..."), True),
        (ConnectionResetError(104, "Connection reset by peer"), False),
    ],
)
def test_other_errors_stay_what_they_are(error, dies):
    batches = Batches(error, dies=dies)
    try:
        with pytest.raises(type(error)) as raised, dead_workers_named():
            batches.get()
        assert raised.value is error
    finally:
        batches.end()
    with pytest.raises(ConnectionResetError), dead_workers_named():
        raise ConnectionResetError
