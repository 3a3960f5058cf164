"""What each block of a network makes of images: one vector per image and block, and what enters the head."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hfft.data.images.batches import Examples
from hfft.model.anatomy import dissect, head_modules, tensor_names
from hfft.model.trace import Call, trace

HEAD_INPUT = "head input"
"""Name of the features that enter the head, after those of the blocks."""


@dataclass(frozen=True)
class Features:
    """What a network makes of N images.

    Attributes:
        by_part: Name of the block, or HEAD_INPUT, to features (N, D), averaged over tokens or space.
        logits: (N, K).
    """

    by_part: Mapping[str, np.ndarray]
    logits: np.ndarray


def collect_features(
    model: Any,
    examples: Examples,
    floats: Callable[[torch.Tensor], torch.Tensor],
    *,
    device: torch.device,
    batch_size: int,
) -> Features:
    """Run a network over images, in evaluation mode and float32; it is left as it was.

    Args:
        model: A classifier, without adapters.
        examples: At least one image, all of one size.
        floats: Pixels of a batch to what the network takes.
        device: Where to compute.
        batch_size: Images per forward pass.
    """
    found: dict[str, list[np.ndarray]] = {}
    logits: list[np.ndarray] = []
    with as_before(model), torch.no_grad():
        model.to(device).eval()
        taps: dict[str, tuple[str, bool]] | None = None
        for start in range(0, len(examples), batch_size):
            rows = [examples[k]["pixel_values"] for k in range(start, min(start + batch_size, len(examples)))]
            pixels = floats(torch.stack(rows).to(device))  # (B, C, H, W)
            taps = taps or _taps(model, pixels[:1].expand(2, -1, -1, -1))
            with _tapped(model, taps) as seen:
                logits.append(model(pixel_values=pixels).logits.float().cpu().numpy())  # (B, K)
            for name in taps:
                if (vectors := _pooled(seen.get(name), len(rows))) is not None:
                    found.setdefault(name, []).append(vectors.float().cpu().numpy())  # (B, D)
    return Features({name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(logits))


def block_modules(model: nn.Module, pixels: torch.Tensor) -> dict[str, str]:
    """By name of a block, in their order, the path of the module whose output is the block's.

    Args:
        model: A classifier, without adapters.
        pixels: Images as the network takes them, (2, C, H, W), where the model is.
    """
    return {name: path for name, (path, _) in _taps(model, pixels).items() if name != HEAD_INPUT}


@contextmanager
def head_input(model: nn.Module) -> Iterator[Callable[[int], torch.Tensor]]:
    """Watch what enters the head in forward passes.

    Yields:
        A function: number of images of the last pass -> what entered, (B, D).
    """
    path = head_modules(dissect(model))[0]
    with _tapped(model, {HEAD_INPUT: (path, True)}) as seen:

        def last(images: int) -> torch.Tensor:
            vectors = _pooled(seen.get(HEAD_INPUT), images)
            assert vectors is not None
            return vectors.float()

        yield last


@contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Put the modes and the place of a model back afterwards."""
    modes, device = [(module, module.training) for module in model.modules()], model.device
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
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
        inner = [
            path for path in owners if not _holds(path, others)
        ]  # CvT's third stage owns a token of its first block
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
def _tapped(model: nn.Module, taps: Mapping[str, tuple[str, bool]]) -> Iterator[dict[str, Any]]:
    """Note what leaves, or enters, the modules in a forward pass; of several calls the last."""
    seen: dict[str, Any] = {}
    with ExitStack() as undo:
        for name, (path, is_input) in taps.items():
            module = model.get_submodule(path)
            if is_input:

                def enter(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    seen[name] = (args, kwargs)

                undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            else:

                def leave(_: Any, __: Any, output: Any, name: str = name) -> None:
                    seen[name] = output

                undo.callback(module.register_forward_hook(leave).remove)
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
