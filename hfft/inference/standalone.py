"""predict.py of an export and app.py of a Space: a module and what it imports from hfft, as one source."""

import importlib
import inspect
import re
from types import ModuleType

_OWN = re.compile(r"^from (hfft[\w.]*) import .+\n", re.MULTILINE)


def without_hfft(module: ModuleType) -> str:
    """The module's source, where each line that imports from hfft is replaced by the source of that module."""
    return _OWN.sub(lambda found: without_hfft(importlib.import_module(found[1])), inspect.getsource(module))
