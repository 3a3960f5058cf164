"""The quick way to import torch and transformers, for the verbs of the command line."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
