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

    It would walk over them again and again, for a quarter of the time that they take. What was imported is never
    looked at again (`gc.freeze`), except where torch was there before: such a process has garbage of its own.
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
    """Check that the packages of one of hfft's extras are installed; imports none of them.

    Args:
        extra: Name of the extra, as pip takes it.
        packages: Top-level modules.

    Raises:
        MissingPackageError: If one is missing; says how to install it.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(f'{", ".join(missing)} {are} not installed: pip install "hfft[{extra}]"')


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module that was blocked in sys.modules
        return False
