"""Imports of heavy and of optional packages, when a command needs them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from hfft.errors import MissingPackageError


@contextmanager
def quick_imports() -> Iterator[None]:
    """Keep the garbage collector away from imports, which make a million objects and hardly any garbage.

    It would walk over them for a quarter of the time that they take. They are never looked at again (`gc.freeze`),
    except where torch was there before: such a process has garbage of its own.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def require(extra: str, *packages: str) -> None:
    """Check that the packages of one of hfft's extras are installed; imports none of them."""
    missing = []
    for name in packages:
        try:
            is_there = find_spec(name) is not None
        except ValueError:  # a module that was blocked in sys.modules
            is_there = False
        missing += [] if is_there else [name]
    if missing:
        raise MissingPackageError(f'not installed: {", ".join(missing)}; pip install "hfft[{extra}]"')
