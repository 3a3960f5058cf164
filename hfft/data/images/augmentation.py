"""Random changes of training images, at the size that the model takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from hfft.data.images.decoding import Decoded
from hfft.recipe.augment import AugmentSpec

_BY_PILLOW = {
    Image.Resampling.NEAREST: InterpolationMode.NEAREST,
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
}


def augmentation_steps(augment: AugmentSpec, fill: Any) -> list[Callable[[Any], Any]]:
    """Steps from (3, H, W) uint8 to the same; `fill` is the color of what is erased, three numbers from 0 to 255."""
    steps: list[Callable[[Any], Any]] = []
    if augment.flip in (True, "horizontal", "both"):
        steps.append(transforms.RandomHorizontalFlip())
    if augment.flip in ("vertical", "both"):
        steps.append(transforms.RandomVerticalFlip())
    if augment.rotate90:
        steps.append(quarter_turns)
    if augment.randaugment is not None:  # in Pillow four times faster, as the next
        steps += [as_pillow, transforms.RandAugment(magnitude=augment.randaugment), as_rgb_tensor]
    if augment.trivialaugment:
        steps += [as_pillow, transforms.TrivialAugmentWide(), as_rgb_tensor]
    if augment.augmix is not None:
        steps.append(transforms.AugMix(severity=augment.augmix))
    if augment.color > 0:
        steps.append(transforms.ColorJitter(augment.color, augment.color, augment.color))
    if augment.erasing > 0:
        steps.append(transforms.RandomErasing(augment.erasing, value=fill))
    return steps


def quarter_turns(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (C, H, W) turned by 0, 90, 180 or 270 degrees."""
    return torch.rot90(pixels, int(torch.randint(4, ())), dims=(1, 2))


def random_crop(processor: Any, size: tuple[int, int], share: tuple[float, float]) -> Callable[[Any], Any]:
    """Crops of a share of the area, resized to (height, width), shown as in evaluation: with bars, or squashed."""
    how, fit = _interpolation(processor), getattr(processor, "fit", None)
    if fit is None:
        return transforms.RandomResizedCrop(size, scale=share, interpolation=how)
    return _FittedCrop(size, share, how, letterbox_color(processor) if fit == "letterbox" else None)


def letterbox_color(processor: Any) -> list[int]:
    """The color of the bars: timm's are as the mean of its images, others black."""
    mean = getattr(processor, "data_config", {}).get("mean", (0, 0, 0))
    return [round(255 * value) for value in mean]


@dataclass(frozen=True)
class _FittedCrop:
    """A random crop of the image as `data.fit` shows it, taken from its own pixels."""

    size: tuple[int, int]
    share: tuple[float, float]
    interpolation: InterpolationMode
    bars: Any  # their color, in a letterbox; else None

    def __call__(self, image: Any) -> Any:
        """A Pillow image or a tensor (C, H, W) to the same kind, at `size`."""
        height, width = functional.get_size(image)
        if self.bars is not None:
            image = image.convert("RGB") if isinstance(image, Image.Image) else image.expand(3, -1, -1)
            high = max(round(width * self.size[0] / self.size[1]), height)
            wide = max(round(height * self.size[1] / self.size[0]), width)
            left, top = (wide - width) // 2, (high - height) // 2
            image = functional.pad(image, [left, top, wide - width - left, high - height - top], fill=self.bars)
            height, width = high, wide
        ratio = (3 / 4 * width / height, 4 / 3 * width / height)
        return transforms.RandomResizedCrop(self.size, self.share, ratio, self.interpolation)(image)


def _interpolation(processor: Any) -> InterpolationMode:
    asked = getattr(processor, "resample", None)
    if asked is None:
        asked = getattr(processor, "data_config", {}).get("interpolation", "bicubic")
    if isinstance(asked, str):
        known = {mode.value for mode in InterpolationMode}
        return InterpolationMode(asked) if asked in known else InterpolationMode.BICUBIC
    return _BY_PILLOW.get(Image.Resampling(asked), InterpolationMode.BICUBIC)


def as_pillow(image: Decoded) -> Image.Image:
    """A Pillow image of a decoded one."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray((image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)).numpy())


def as_tensor(image: Decoded) -> torch.Tensor:
    """(1 or 3, H, W) uint8; a view on (H, W, 3) for a Pillow image, which torchvision resizes without a copy."""
    if isinstance(image, torch.Tensor):
        return image
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def as_rgb_tensor(image: Decoded) -> torch.Tensor:
    """(3, H, W) uint8."""
    return as_tensor(image).expand(3, -1, -1)
