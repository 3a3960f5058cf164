"""The source of a module as a program that runs without hfft: what exports and Spaces hold."""

import importlib
import inspect
import re
from types import ModuleType

_OWN = re.compile(r"^from (hfft[\w.]*) import .+\n", re.MULTILINE)


def without_hfft(module: ModuleType) -> str:
    """The module's source, in which every module of hfft that it imports from stands in the place of the import."""
    return _OWN.sub(lambda found: without_hfft(importlib.import_module(found[1])), inspect.getsource(module))
