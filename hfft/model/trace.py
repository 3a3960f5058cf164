"""A forward pass, watched: which modules run, in which order, and the shapes they return for any number of images."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Shape:
    """Shape and type of a tensor for any number of images B: each dimension is `fixed + growing * B`."""

    fixed: tuple[int, ...]
    growing: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_per_image(self) -> bool:
        """Whether it has one row per image, and only that depends on their number."""
        return self.growing[:1] == (1,) and self.fixed[0] == 0 and not any(self.growing[1:])

    def placeholder(self, images: int, device: torch.device) -> torch.Tensor:
        """A tensor of this shape without memory, full of NaN where the type has it: nothing may depend on it."""
        sizes = [fixed + growing * images for fixed, growing in zip(self.fixed, self.growing, strict=True)]
        value = float("nan") if self.dtype.is_floating_point else 0
        return torch.full((), value, dtype=self.dtype, device=device).expand(sizes)


@dataclass(frozen=True)
class Call:
    """When a module was first entered and last left, in a count of all entries and exits; how often it was called.

    Attributes:
        output: Of the last call; a structure with each tensor replaced by its Shape.
    """

    entered: int
    left: int
    times: int
    output: Any


def trace(model: nn.Module, pixels: torch.Tensor) -> dict[str, Call]:
    """Every module that runs in a forward pass over two images, (2, C, H, W), by path, in the order of entry."""
    two, three = _record(model, pixels), _record(model, torch.cat([pixels, pixels[:1]]))
    merge = partial(pytree.tree_map, shape_of)
    return {path: replace(call, output=merge(call.output, three[path].output)) for path, call in two.items()}


def _record(model: nn.Module, pixels: torch.Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    clock = iter(range(2**62))

    def enter(path: str) -> None:
        before = calls.get(path, Call(next(clock), -1, 0, None))
        calls[path] = Call(before.entered, -1, before.times + 1, None)

    def leave(path: str, output: Any) -> None:
        empty = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, output)
        calls[path] = Call(calls[path].entered, next(clock), calls[path].times, empty)

    with ExitStack() as undo, torch.no_grad():
        for path, module in model.named_modules():
            entry = module.register_forward_pre_hook(lambda *_, path=path: enter(path))
            exit_ = module.register_forward_hook(lambda _, __, output, path=path: leave(path, output))
            undo.callback(entry.remove)
            undo.callback(exit_.remove)
        model(pixel_values=pixels)
    return calls


def shape_of(two: Any, three: Any) -> Any:
    """The Shape of a tensor that was seen for two and for three images; anything else as it is."""
    if not isinstance(two, torch.Tensor):
        return two
    growing = tuple(more - less for less, more in zip(two.shape, three.shape, strict=True))
    fixed = tuple(size - 2 * growth for size, growth in zip(two.shape, growing, strict=True))
    return Shape(fixed, growing, two.dtype)
