"""Processes of one launch that watch each other: none waits long for one that stopped, and one of them speaks.

Collective operations wait for hours for a process that has stopped, and a shorter limit would end right waits too. So
a thread of each process says every few seconds that it is alive. The thread stands still while other code holds
Python's lock: so a process that is silent counts as alive while another one on its machine sees that it exists and
isn't stopped. A main thread that alone is stuck is not noticed.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from hfft.errors import TrainingError
from hfft.system.distributed import connect, meet, own_store

_BEAT = 3.0  # seconds between two signs of life
_SILENCE = 7  # beats without one
_LOST = 10 * _SILENCE  # likewise, where nobody on its machine can say whether the process exists
_GONE = (  # how gloo and NCCL say that another process is no longer there
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"),
    "NCCL communicator was aborted",
)
_LATE = ("Timed out waiting", "wait timeout", "Watchdog caught collective operation timeout")
_DEAD = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_CONTINUES = "the same command continues from the last whole checkpoint, where there is one"


def may_speak() -> bool:
    """Whether this process is the one that tells of a failure: the first that asks, where the launch has a store."""
    rank = os.environ.get("RANK", "0")
    if not (torch.distributed.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return rank == "0"
    try:  # torch's launcher keeps a store before its processes know of each other
        return own_store().compare_set("hfft/speaker", "", rank).decode() == rank
    except RuntimeError:  # the process that kept the store is gone
        return True


@contextmanager
def watched(state: PartialState) -> Iterator[None]:
    """End this process soon after another process of the launch died or stopped to answer.

    A collective operation that fails because another process is gone, or gives up waiting for it, is a TrainingError.
    """
    if state.num_processes == 1:
        yield
        return
    watch = _Watch(connect(), state)
    watch.beat()
    meet()
    watch.start()
    try:
        yield
        meet()
    except RuntimeError as error:
        if any(words in str(error) for words in _LATE):
            raise TrainingError(
                "a process of this launch waited longer for another one than it may, though all of them are there; "
                f"training.ddp_timeout, in seconds, lets it wait longer, and {_CONTINUES}"
            ) from error
        if not any(words in str(error) for words in _GONE):
            raise
        raise TrainingError(f"another process of this launch has ended; {_CONTINUES}") from error
    finally:
        watch.stop()


class _Watch(threading.Thread):
    def __init__(self, store: Store, state: PartialState) -> None:
        super().__init__(daemon=True, name="hfft liveness")
        self._store: Any = store  # torch's stubs leave `has_extended_api` out
        self._rank = state.process_index
        self._others = [rank for rank in range(state.num_processes) if rank != self._rank]
        self._self = _Process(socket.gethostname(), os.getpid(), _machine())
        self._stopped = threading.Event()
        self._beats = 0
        # By rank: its last sign of life, and our beat when it came.
        self._heard: dict[int, tuple[bytes, int]] = dict.fromkeys(self._others, (b"", 0))

    def beat(self) -> None:
        self._say(self._rank, self._self)
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
                self._listen()
            except RuntimeError:
                failures += 1
                if failures >= _SILENCE:
                    self._end("the process that keeps this launch together", failures)
                continue
            failures = 0

    def _say(self, rank: int, process: "_Process") -> None:  # signs differ from all signs before them
        self._store.set(_key(rank), json.dumps([[self._rank, self._beats], *process]))

    def _listen(self) -> None:
        keys = [_key(rank) for rank in self._others]
        signs = self._store.multi_get(keys) if self._store.has_extended_api() else [*map(self._store.get, keys)]
        for rank, sign in zip(self._others, signs, strict=True):
            if sign != self._heard[rank][0]:
                self._heard[rank] = sign, self._beats
            silence = self._beats - self._heard[rank][1]
            process = _Process(*json.loads(sign)[1:])
            if silence >= _SILENCE and process.machine == self._self.machine and _works(process.pid):
                self._say(rank, process)  # for itself, and for other machines
            elif silence >= (_SILENCE if process.machine == self._self.machine else _LOST):
                self._end(f"process {rank} ({process.host} pid {process.pid})", silence)

    def _end(self, who: str, beats: int) -> None:  # from this thread: the main one waits in a collective operation
        if not self._stopped.is_set():
            if may_speak():
                sys.stderr.write(f"error: {who} has not answered for {beats * _BEAT:.0f} s; {_CONTINUES}\n")
                sys.stderr.flush()
            os._exit(1)


class _Process(NamedTuple):
    """Where a process runs; a machine is a kernel since its start, and what numbers its processes."""

    host: str
    pid: int
    machine: str


def _machine() -> str:
    parts = [f"{psutil.boot_time():.0f} {socket.gethostname()}", "1"]
    with suppress(OSError):  # Linux
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _works(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in _DEAD
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _key(rank: int) -> str:
    return f"hfft/alive/{rank}"
