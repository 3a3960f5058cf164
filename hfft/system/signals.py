"""Ctrl-C and SIGTERM: one KeyboardInterrupt, in the main process, soon; while a phase trains, after saving."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_AT_ONCE, _LATER, _NEVER = 0.001, 1.0, 0.0  # seconds, as setitimer takes them
_ECHO = 3.0  # seconds in which a launcher passes on what the terminal has sent already
_NO_WORKER = "DataLoader worker"  # torch tells of a dead one wherever it is; where that is dropped, once more
_HAS_ALARM = hasattr(signal, "SIGALRM")
_ASKING = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _Request:
    signal: int | None = None  # that asked this process to stop
    since: float = 0.0
    may_wait: bool = False


_request = _Request()


def stop_signal() -> int | None:
    """The signal that asked this process to stop, if one did."""
    return _request.signal


@contextmanager
def patient() -> Iterator[None]:
    """Let the first signal wait inside; the work there looks at `stop_signal`, saves and raises KeyboardInterrupt.

    A second one interrupts at once. What has waited to the end interrupts there.
    """
    _request.may_wait = True
    try:
        yield
    finally:
        _request.may_wait = False
    if _request.signal is not None:
        raise KeyboardInterrupt


@contextmanager
def prompt_interruption() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end this process, and not its data loader workers, with KeyboardInterrupt.

    Python drops an exception that is raised in a finalizer or a fork hook, and tells `sys.unraisablehook`: it is
    raised again at once, and every second until it arrives (where the system has SIGALRM). Finalizers of what was only
    half made then complain; that is kept silent to the end of the process.
    """
    asked = os.getpid()
    numbers = (*_ASKING, signal.SIGALRM) if _HAS_ALARM else _ASKING
    before = {number: signal.getsignal(number) for number in numbers}
    report, hook = sys.unraisablehook, sys.excepthook
    is_interrupted = False
    _request.signal = None

    def interrupt(number: int, _: object) -> None:
        nonlocal is_interrupted
        if os.getpid() != asked:
            _end_worker(number)
            return
        if number in _ASKING and _waits(number):
            return
        is_interrupted = True
        _raise_again_in(_LATER)
        raise KeyboardInterrupt

    def note_dropped(dropped: Any) -> None:
        if is_interrupted and issubclass(dropped.exc_type, KeyboardInterrupt):
            _raise_again_in(_AT_ONCE)
        elif not (is_interrupted or str(dropped.exc_value).startswith(_NO_WORKER)):
            report(dropped)

    sys.unraisablehook, sys.excepthook = note_dropped, partial(_tell_unless_of_worker, asked, hook)
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        _raise_again_in(_NEVER)
        sys.excepthook = hook
        if not is_interrupted:
            sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def last_words() -> Iterator[None]:
    """Put around `prompt_interruption`: requests to stop that come when its handlers are gone are ignored."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def apart(do: Callable[[], _Result]) -> _Result:
    """Do what waits for threads of its own, in one more thread: an interruption ends the wait for it at once.

    It is left behind then, and goes on until the process ends; so it must change nothing that counts.
    """
    future: Future[_Result] = Future()

    def work() -> None:
        try:
            future.set_result(do())
        except BaseException as error:  # handed over to the caller's thread
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()


def end_process(code: int) -> None:
    """End this process without waiting for its other threads.

    The interpreter's own end waits for each thread of a pool, such as an upload that waits to be tried again, and
    threads of gloo were seen to abort it.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _tell_unless_of_worker(asked: int, tell: Callable[..., Any], kind: type[BaseException], *error: Any) -> None:
    # Processes that read images don't complain of a connection that broke at the run's end.
    if os.getpid() == asked or not issubclass(kind, ConnectionError | EOFError):
        tell(kind, *error)


def _end_worker(number: int) -> None:
    """In a forked process: SIGTERM ends it, as if there were no handler; Ctrl-C is the main process's affair."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _waits(number: int) -> bool:
    """Note a request to stop; whether the work at hand may go on to a point where it can be continued."""
    is_first, now = _request.signal is None, time.monotonic()
    if is_first:
        _request.signal, _request.since = number, now
    if _request.may_wait and is_first and os.environ.get("RANK", "0") == "0":
        over = b"\r\x1b[K" if os.isatty(2) else b""  # what a progress bar has drawn
        os.write(2, over + b"stopping once this step is saved; again to stop at once\n")  # print may be below us
    return _request.may_wait and (is_first or now - _request.since < _ECHO)


def _raise_again_in(seconds: float) -> None:
    if _HAS_ALARM:
        signal.setitimer(signal.ITIMER_REAL, seconds)
