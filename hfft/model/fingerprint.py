"""What a part of a network computes depends on its weights, its modules and their code: all of it as one hash."""

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from hfft.model.anatomy import PEFT_PREFIX
from hfft.model.freezing import hash_tensors

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
_TYPED_IN: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def hash_modules(modules: Mapping[str, nn.Module]) -> str:
    """Hash of modules by path: their architecture and the values of their tensors."""
    owned = ((path, name, tensor) for path, module in modules.items() for name, tensor in own_tensors(module))
    tensors = {_plain_name(f"{path}.{name}"): tensor for path, name, tensor in owned}
    return hashlib.blake2b((_describe_modules(modules) + hash_weights(tensors)).encode(), digest_size=16).hexdigest()


def hash_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of the names and the contents of some tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(hash_tensors(tensors).items()):
        digest.update(f"{name} ".encode() + content)
    return digest.hexdigest()


def hash_architecture(modules: Mapping[str, nn.Module]) -> str:
    """Hash of classes, settings and code of modules by path; shape, type and order in memory of their tensors."""
    return hashlib.blake2b(_describe_modules(modules).encode(), digest_size=8).hexdigest()


def _describe_modules(modules: Mapping[str, nn.Module]) -> str:
    lines = []
    for path, module in modules.items():
        lines.append(f"{_plain_name(path)} {type(module).__qualname__} {_ADDRESS.sub('', module.extra_repr())}")
        for name, tensor in own_tensors(module):
            kind = f"{tuple(tensor.shape)} {tensor.dtype} {is_channels_last(tensor)}"
            lines.append(f"{_plain_name(f'{path}.{name}')} {kind}")
    return "\n".join([*sorted(lines), hash_code({type(module) for module in modules.values()})])


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module without those of the modules in it."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _plain_name(name: str) -> str:
    """A path or a tensor's name without what an adapter adds to it."""
    return f"{name}.".removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").strip(".")


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether only channels-last order describes the memory of a tensor; a 1x1 convolution's fits both."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def hash_code(classes: Iterable[type]) -> str:
    """Hash of the source of classes and of what it imports; of installed packages, their versions count instead.

    A class whose source is in no file, such as one that was typed in, is another one in each process.
    """
    bases = {base for kind in classes for base in kind.__mro__}
    texts, packages = _sources({base.__module__ for base in bases})
    parts = {f"{package} {_version(package)}" for package in packages} | set(texts.values())
    for base in bases:
        if base.__module__ in texts:  # what runs, where the file was edited after it had been read
            parts |= {_instructions(method.__code__) for method in vars(base).values() if hasattr(method, "__code__")}
        elif _file(base.__module__) is None and base.__module__ not in sys.builtin_module_names:
            parts.add(_TYPED_IN.setdefault(base, uuid.uuid4().hex))
    digest = hashlib.blake2b(digest_size=16)
    for part in sorted(hashlib.blake2b(part.encode(), digest_size=16).digest() for part in parts):
        digest.update(part)
    return digest.hexdigest()


def _sources(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Source by module, for those that no package installed and all that they import; and the packages behind them."""
    texts: dict[str, str] = {}
    packages: set[str] = set()
    waiting = list(names)
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if file is None:
            continue
        if _INSTALLED & set(file.parts):
            packages.add(name.partition(".")[0])
        elif not _STANDARD & set(file.parents):
            texts[name] = file.read_bytes().decode("utf-8", "replace")
            found = set(_imports(texts[name], sys.modules[name].__package__)) - seen
            seen |= found
            waiting += found
    return texts, packages


def _file(name: str) -> Path | None:
    """Where the source of a module is; None where it isn't loaded, or has none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _imports(text: str, package: str | None) -> Iterator[str]:
    """Full names of what a source imports, modules and what is in them."""
    tree = ast.Module([], [])
    with suppress(SyntaxError, ValueError):  # no Python, such as a compiled extension
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _instructions(code: CodeType) -> str:
    """A function's instructions, names and constants, without the places in its file."""
    return repr((code.co_code, code.co_names, code.co_varnames, [_constant(value) for value in code.co_consts]))


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _instructions(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the package of another name, such as Pillow's PIL
        return str(getattr(sys.modules.get(package), "__version__", ""))
