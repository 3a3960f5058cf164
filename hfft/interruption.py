"""Ctrl-C: one KeyboardInterrupt, in the main process, soon."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AT_ONCE, _LATER, _NEVER = 0.001, 1.0, 0.0  # seconds, as setitimer takes them
_HAS_ALARM = hasattr(signal, "SIGALRM")


@contextmanager
def prompt_interruption() -> Iterator[None]:
    """Let Ctrl-C end this process, and this one only, with KeyboardInterrupt.

    A terminal sends it to data loader workers too; they inherit the handler and stay silent. Python drops an exception
    that is raised in a finalizer or a fork hook, and tells `sys.unraisablehook`: it is raised again at once, and every
    second until it arrives (where the system has SIGALRM). Finalizers of what was only half made then, such as a data
    loader's, complain; that is kept silent to the end of the process.
    """
    asked = os.getpid()
    numbers = (signal.SIGINT, signal.SIGALRM) if _HAS_ALARM else (signal.SIGINT,)
    before = {number: signal.getsignal(number) for number in numbers}
    report = sys.unraisablehook
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        if os.getpid() == asked:
            is_interrupted = True
            _raise_again_in(_LATER)
            raise KeyboardInterrupt

    def note_dropped(dropped: Any) -> None:
        if not is_interrupted:
            report(dropped)
        elif issubclass(dropped.exc_type, KeyboardInterrupt):
            _raise_again_in(_AT_ONCE)

    sys.unraisablehook = note_dropped
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        _raise_again_in(_NEVER)
        if not is_interrupted:
            sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_again_in(seconds: float) -> None:
    if _HAS_ALARM:
        signal.setitimer(signal.ITIMER_REAL, seconds)
