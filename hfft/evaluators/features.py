"""What each block of a network makes of images: one vector per image and block, and what enters the head."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.utils import _pytree as pytree

from hfft.data.images.batches import Examples
from hfft.model.anatomy import dissect, head_modules, tensor_names
from hfft.model.trace import Call, trace

HEAD_INPUT = "head input"
"""Name of the features that enter the head, after those of the blocks."""


@dataclass(frozen=True)
class Features:
    """What a network makes of N images."""

    by_part: Mapping[str, np.ndarray]  # block, or HEAD_INPUT, to features (N, D), averaged over tokens or space
    logits: np.ndarray  # (N, K)


def collect_features(model: Any, examples: Examples, floats: Callable[[torch.Tensor], torch.Tensor]) -> Features:
    """Run a classifier without adapters over images of one size, in evaluation mode and float32; it is left as it was.

    `floats` makes pixels of a batch what the network takes.
    """
    device = torch.device(str(PartialState().device))
    batch_size = 8 if device.type == "cpu" else 64  # on a CPU few at once are faster: more leave its cache
    found: dict[str, list[np.ndarray]] = {}
    logits: list[np.ndarray] = []
    with as_before(model), torch.no_grad():
        model.to(device).eval()
        taps: dict[str, tuple[str, bool]] | None = None
        for start in range(0, len(examples), batch_size):
            rows = [examples[k]["pixel_values"] for k in range(start, min(start + batch_size, len(examples)))]
            pixels = floats(torch.stack(rows).to(device))  # (B, C, H, W)
            taps = taps or _taps(model, pixels[:1].expand(2, -1, -1, -1))
            with tapped(model, taps) as seen:
                logits.append(model(pixel_values=pixels).logits.float().cpu().numpy())  # (B, K)
            for name in taps:
                if (vectors := _pooled(seen.get(name), len(rows))) is not None:
                    found.setdefault(name, []).append(vectors.float().cpu().numpy())  # (B, D)
    return Features({name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(logits))


def block_modules(model: nn.Module, pixels: torch.Tensor) -> dict[str, str]:
    """By name of a block, in their order, the path of the module whose output is the block's; pixels (2, C, H, W)."""
    return {name: path for name, (path, _) in _taps(model, pixels).items() if name != HEAD_INPUT}


@contextmanager
def head_input(model: nn.Module) -> Iterator[Callable[[int], torch.Tensor]]:
    """A function: number of images of the last forward pass -> what entered the head, (B, D)."""
    path = head_modules(dissect(model))[0]
    with tapped(model, {HEAD_INPUT: (path, True)}) as seen:

        def last(images: int) -> torch.Tensor:
            vectors = _pooled(seen.get(HEAD_INPUT), images)
            assert vectors is not None
            return vectors.float()

        yield last


@contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Put the modes and the place of a model back afterwards, and which parameters need a gradient."""
    modes, device = [(module, module.training) for module in model.modules()], model.device
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, is_needed in needed:
            parameter.requires_grad_(is_needed)
        model.to(device)


def _taps(model: nn.Module, pixels: torch.Tensor) -> dict[str, tuple[str, bool]]:
    """By name of a block, the module whose output is the block's; and for the head one whose input is.

    The module is the outermost one around the block's last that holds nothing of other parts.
    """
    anatomy, calls = dissect(model), trace(model, pixels)
    everything = set(tensor_names(model))
    taps = {}
    for block in anatomy.blocks:
        others = everything - set(block.tensors)
        owners = {name.rpartition(".")[0] for name in block.tensors} & set(calls)
        inner = [path for path in owners if not _holds(path, others)]  # CvT's third stage owns a token of a block
        if inner:
            last = max(inner, key=lambda path: calls[path].left)
            taps[block.name] = (_outermost(last, others, calls), False)
    head = next((path for path in head_modules(anatomy) if path in calls), None)
    return taps if head is None else {**taps, HEAD_INPUT: (head, True)}


def _outermost(path: str, others: set[str], calls: Mapping[str, Call]) -> str:
    found = path
    while (path := path.rpartition(".")[0]) and not _holds(path, others):
        found = path if path in calls else found
    return found


def _holds(path: str, tensors: set[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in tensors)


@contextmanager
def tapped(model: nn.Module, taps: Mapping[str, tuple[str, bool]]) -> Iterator[dict[str, Any]]:
    """Note what leaves the modules of these paths, or, where the flag says so, enters them; of calls the last."""
    seen: dict[str, Any] = {}

    def note(name: str, is_input: bool, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen[name] = (args, kwargs) if is_input else output

    with ExitStack() as undo:
        for name, (path, is_input) in taps.items():
            hook = partial(note, name, is_input)
            undo.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        yield seen


def _pooled(value: Any, images: int) -> torch.Tensor | None:
    """The first tensor with a row per image, averaged over tokens (B, T, D) or space (B, D, H, W) or (B, H, W, D)."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[0] == images:
            if leaf.ndim == 4:
                is_last = leaf.shape[1] == leaf.shape[2] != leaf.shape[3]
                return leaf.mean(dim=(1, 2) if is_last else (2, 3))
            return leaf.flatten(1, -2).mean(dim=1) if leaf.ndim > 2 else leaf
    return None


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64, as small distances are differences of large numbers; a row of zeros stays one."""
    values = features.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float64).tiny)
