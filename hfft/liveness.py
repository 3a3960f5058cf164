"""Processes of one launch that watch each other: none waits long for one that stopped, and one of them speaks.

Collective operations wait half an hour for a process that has stopped, on a CPU whatever `ddp_timeout` says. A shorter
limit would also end waits that are right, such as for the main process that reads every image. So each process says
every few seconds, from a thread of its own, that it is alive. A main thread that alone is stuck, such as in a file
system that hangs, is not noticed.
"""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hfft.errors import TrainingError

_BEAT = 3.0  # seconds between two signs of life
_SILENCE = 7  # beats without one
_GONE = (  # how gloo and NCCL say that another process is no longer there
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting"),
    *("remote process exited", "NCCL communicator was aborted"),
)
_CONTINUES = "the same command continues from the last whole checkpoint"

_store: TCPStore | None = None


def may_speak() -> bool:
    """Whether this process is the one that tells of a failure: the first that asks, where the launch has a store."""
    rank = os.environ.get("RANK", "0")
    try:
        store = _store or _launchers_store()
        return rank == "0" if store is None else store.compare_set("hfft/speaker", "", rank).decode() == rank
    except RuntimeError:  # the process that kept the store is gone
        return True


def leave() -> None:
    """Close the connections to the other processes: gloo's threads were seen to abort a process that just ends."""
    global _store
    _store = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def watched(state: PartialState) -> Iterator[None]:
    """End this process soon after another process of the launch died or stopped to answer.

    Raises:
        TrainingError: If a collective operation failed because another process is gone.
    """
    global _store
    if state.num_processes == 1:
        yield
        return
    _store = _connect()
    watch = _Watch(_connect(), state)
    watch.beat()
    state.wait_for_everyone()
    watch.start()
    try:
        yield
        state.wait_for_everyone()
    except RuntimeError as error:
        if not any(words in str(error) for words in _GONE):
            raise
        raise TrainingError(f"another process of this launch has ended; {_CONTINUES}") from error
    finally:
        watch.stop()


class _Watch(threading.Thread):
    """Says that this process is alive, and looks for signs of the others."""

    def __init__(self, store: TCPStore, state: PartialState) -> None:
        super().__init__(daemon=True, name="hfft liveness")
        self._store = store
        self._rank = state.process_index
        self._others = [rank for rank in range(state.num_processes) if rank != self._rank]
        self._stopped = threading.Event()
        self._beats = 0
        # By rank: its last sign of life, and our beat when it came.
        self._heard: dict[int, tuple[bytes, int]] = dict.fromkeys(self._others, (b"", 0))

    def beat(self) -> None:
        self._store.set(_key(self._rank), f"{self._beats} {socket.gethostname()} pid {os.getpid()}")
        self._beats += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join(2 * _BEAT)

    def run(self) -> None:
        """Until stopped; counts beats and no seconds, so that a laptop that slept accuses nobody."""
        failures = 0
        while not self._stopped.wait(_BEAT):
            try:
                self.beat()
                signs = self._store.multi_get([_key(rank) for rank in self._others])
            except RuntimeError:
                failures += 1
                if failures >= _SILENCE:
                    self._end("the process that keeps this launch together has not answered")
                continue
            failures = 0
            for rank, sign in zip(self._others, signs, strict=True):
                if sign != self._heard[rank][0]:
                    self._heard[rank] = sign, self._beats
            silent = [rank for rank in self._others if self._beats - self._heard[rank][1] >= _SILENCE]
            if silent:
                place = self._heard[silent[0]][0].decode().partition(" ")[2]
                self._end(f"process {silent[0]} ({place}) has not answered")

    def _end(self, problem: str) -> None:
        """End this process from its thread: the main one waits in a collective operation."""
        if not self._stopped.is_set():
            if may_speak():
                sys.stderr.write(f"error: {problem} for {_SILENCE * _BEAT:.0f} s; {_CONTINUES}\n")
                sys.stderr.flush()
            os._exit(1)


def _launchers_store() -> TCPStore | None:
    """The store that torch's launcher keeps before its processes know of each other; None elsewhere."""
    return _connect() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None


def _connect() -> TCPStore:
    """A connection of its own to the store of the launch: a thread that waits must not hold up another one."""
    patience = timedelta(seconds=_SILENCE * _BEAT)
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=patience)


def _key(rank: int) -> str:
    return f"hfft/alive/{rank}"
