"""Processes of one launch: how long they wait for each other, and what the main one does for all of them."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch.distributed import FileStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _get_default_store

from hfft.errors import HfftError, RunError

_Value = TypeVar("_Value")

_LIMIT = 2 * 3600  # seconds that a collective operation waits, where no recipe says so with `ddp_timeout`
_PATIENCE = timedelta(seconds=21)  # for an answer of the store itself
_PAUSES = (0.001, 0.05)  # seconds between two looks at the store: at first, and at most

_imported_by = os.getpid()
_turns = itertools.count()  # the same number in every process, as all of them come to the same places
_store: Store | None = None
_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)

_LOG = get_logger(__name__)


def join(limit: int | None = None) -> PartialState:
    """Meet the other processes of the launch; a group that was made before, such as a launcher's, keeps its limit.

    Args:
        limit: Seconds that a collective operation waits for a process; 2 hours when None.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":  # accelerate would look for its package
        raise RunError(
            "DeepSpeed is not supported; FSDP 2 does what ZeRO does: launch with --config_file "
            "recipes/accelerate/fsdp2.yaml. docs/scaling.md says how to launch"
        )
    if torch.cuda.is_available() and torch.cuda._is_in_bad_fork():
        raise RunError(
            "this process was forked from one that has used a GPU, and can't use one: restart the notebook and call "
            "notebook_launcher before anything else, or run `accelerate launch --num_processes N -m hfft train RECIPE`"
        )
    is_joined = torch.distributed.is_initialized()
    launched = torch.distributed.get_world_size() if is_joined else int(os.environ.get("WORLD_SIZE", "1"))
    if os.getpid() != _imported_by and launched != PartialState().num_processes:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one was forked from
    use_cpu = not torch.accelerator.is_available()
    return PartialState(cpu=use_cpu, timeout=timedelta(seconds=_LIMIT if limit is None else limit))


def on_main(compute: Callable[[], _Value]) -> _Value:
    """What the main process computes, or raises as HfftError or OSError, in every process.

    The others wait without the limit of collective operations.
    """
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer = [compute(), None]
        except (HfftError, OSError) as error:
            answer = [None, error]
    meet()
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def meet() -> None:
    """Wait until every process has come here, however long one of them works before.

    In the place of a barrier, which gives up after the limit of collective operations, and can't be interrupted.
    """
    world = PartialState().num_processes
    if world == 1:
        return
    store, turn = own_store(), f"hfft/meet/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_turns)}"
    if store.add(turn, 1) == world:
        store.set(f"{turn}/all", "here")
        return
    pause, longest = _PAUSES
    while not store.check([f"{turn}/all"]):
        time.sleep(pause)
        pause = min(2 * pause, longest)


def own_store() -> Store:
    """The connection of this process's main thread to the store of its launch."""
    global _store
    if _store is None:
        _store = connect()
    return _store


def connect() -> Store:
    """A new connection to the store of the launch: a thread that waits must not hold up another one."""
    if not torch.distributed.is_initialized():
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, timeout=_PATIENCE)
    store: Any = _get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        return TCPStore(store.host, store.port, is_master=False, timeout=_PATIENCE)
    if isinstance(store, FileStore):
        return FileStore(store.path, -1)  # pyright: ignore[reportAttributeAccessIssue]
    return store


def leave() -> None:
    """Close the connections to the other processes: gloo's threads were seen to abort a process that just ends."""
    global _store
    _store = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def inform(message: str) -> None:
    """Log a line in the main process."""
    PartialState()  # the logger asks it which process this is
    _LOG.info(message)


def warn(message: str) -> None:
    """Log a warning in the main process, and add it to `kept_warnings`."""
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
