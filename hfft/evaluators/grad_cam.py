"""Where in an image a network looks for a class: Grad-CAM on a late block, for every family whose blocks keep places.

Source: https://hf.co/papers/1610.02391; for tokens, their grid takes the place of the feature map. Whether a block's
output is such a grid isn't looked up by family: it is believed where a change of a quarter of the image shows most in
the same quarter of the output.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hfft.errors import ModelError
from hfft.evaluators.features import as_before, block_modules, tapped

_LEAST = 4  # places in each direction; fewer tell nothing of where
_MOST_EXTRA = 16  # tokens that stand for no place: of the class, registers
_BATCH = 8  # images


@dataclass(frozen=True)
class Heatmap:
    """What spoke for a class."""

    block: str  # that was looked at
    maps: torch.Tensor  # (N, h, w) float32 on the CPU; the largest of each image is 1, or 0 where nothing spoke for it


def attribute(model: Any, pixels: torch.Tensor, targets: torch.Tensor) -> Heatmap:
    """Find which places of images (N, C, H, W) speak for a class of each, (N,); the model is left as it was.

    The last block that has a grid of 4 x 4 places or more is looked at, and whose places the answer depends on: of a
    network that answers from its class token alone, that is the block before the last.

    Raises:
        ModelError: If no block keeps the places of the image, or none of them counts for the answer.
    """
    with as_before(model):
        model.eval().requires_grad_(False)  # so that what runs before the block leaves nothing behind in memory
        candidates = _placed_blocks(model, pixels[:1])
        for block, path in candidates:
            maps = [
                _grad_cam(model, path, pixels[start : start + _BATCH], targets[start : start + _BATCH])
                for start in range(0, len(pixels), _BATCH)
            ]
            found = torch.cat(maps)
            if found.any():
                return Heatmap(block, found)
    if candidates:
        raise ModelError("nowhere in the image does a late block's output speak for the answer")
    raise ModelError(f"no block's output keeps the places of the image, in {_LEAST} x {_LEAST} of them or more")


def _placed_blocks(model: Any, pixels: torch.Tensor) -> list[tuple[str, str]]:
    """Names and paths of the blocks whose output is a grid of places, the last one first; pixels are (1, C, H, W)."""
    changed = [pixels, *(_with_noise(pixels, quarter) for quarter in range(4))]
    paths = block_modules(model, pixels.expand(2, -1, -1, -1))
    with torch.no_grad(), tapped(model, {block: (path, False) for block, path in paths.items()}) as seen:
        model(pixel_values=torch.cat(changed))
    height, width = pixels.shape[2:]
    return [
        (block, path)
        for block, path in reversed(paths.items())
        if (grid := _as_grid(_first(seen.get(block), 5), height / width)) is not None and _keeps_places(grid)
    ]


def _with_noise(pixels: torch.Tensor, quarter: int) -> torch.Tensor:
    changed = pixels.clone()
    area = _quarter(changed, quarter)
    area.copy_(torch.randn(area.shape, generator=torch.Generator().manual_seed(0)))
    return changed


def _quarter(grid: torch.Tensor, number: int) -> torch.Tensor:
    """A view of the upper left, upper right, lower left or lower right quarter of (..., h, w)."""
    height, width = grid.shape[-2] // 2, grid.shape[-1] // 2
    rows = slice(None, height) if number < 2 else slice(-height, None)
    columns = slice(None, width) if number % 2 == 0 else slice(-width, None)
    return grid[..., rows, columns]


def _keeps_places(grid: torch.Tensor) -> bool:
    """Whether each quarter of (5, C, h, w) differs most where that of the image does; the first image is unchanged."""
    changes = (grid[1:] - grid[:1]).abs().sum(dim=1)  # (4, h, w)
    means = torch.stack([_quarter(changes, number).mean(dim=(1, 2)) for number in range(4)])  # (quarter, image)
    return bool(torch.isfinite(means).all()) and means.argmax(dim=0).tolist() == [0, 1, 2, 3]


def _grad_cam(model: Any, path: str, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Maps (B, h, w) of a block's output, on the CPU."""
    kept: list[torch.Tensor] = []

    def begin(_: Any, __: Any, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten(output)
        place = next(k for k, leaf in enumerate(leaves) if _is_per_image(leaf, len(pixels)))
        kept.append(leaves[place].detach().requires_grad_())
        leaves[place] = kept[-1].clone()  # which what follows may change in place
        return pytree.tree_unflatten(leaves, structure)

    handle = model.get_submodule(path).register_forward_hook(begin)
    try:
        with torch.enable_grad():
            logits = model(pixel_values=pixels).logits  # (B, K)
            (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept[-1])
    finally:
        handle.remove()
    aspect = pixels.shape[2] / pixels.shape[3]
    values, slopes = _as_grid(kept[-1].detach(), aspect), _as_grid(gradient, aspect)
    assert values is not None
    assert slopes is not None
    weights = slopes.float().mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    maps = (weights * values.float()).sum(dim=1).relu()  # (B, h, w)
    most = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(most > 0, maps / most, torch.zeros_like(maps)).cpu()


def _first(output: Any, images: int) -> torch.Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves(output) if _is_per_image(leaf, images)), None)


def _is_per_image(leaf: Any, images: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[0] == images and leaf.is_floating_point()


def _as_grid(tensor: torch.Tensor | None, aspect: float) -> torch.Tensor | None:
    """Features as (B, C, h, w), h / w being the image's; None where they are no such grid, or a coarse one."""
    if tensor is None:
        return None
    if tensor.ndim == 4:
        _, first, second, third = tensor.shape
        if _fits(second, third, aspect):
            return tensor
        return tensor.permute(0, 3, 1, 2) if _fits(first, second, aspect) else None
    if tensor.ndim != 3:
        return None
    tokens = tensor.shape[1]
    for extra in range(min(_MOST_EXTRA, tokens)):  # those that stand for no place come first
        height = round(math.sqrt((tokens - extra) * aspect))
        width = (tokens - extra) // height if height else 0
        if height * width == tokens - extra and _fits(height, width, aspect):
            return tensor[:, extra:].transpose(1, 2).unflatten(2, (height, width))  # (B, C, h, w)
    return None


def _fits(height: int, width: int, aspect: float) -> bool:
    return min(height, width) >= _LEAST and abs(height - width * aspect) < 1
