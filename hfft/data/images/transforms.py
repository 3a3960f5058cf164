"""One image -> the tensor that a model takes: the checkpoint's own processor, and augmentation for training."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import get_image_size_for_max_height_width

from hfft.data.images.augmentation import as_pillow, as_rgb_tensor, as_tensor, augmentation_steps, random_crop
from hfft.data.images.decoding import Decoded
from hfft.data.images.modes import on_background
from hfft.errors import ModelError, first_line
from hfft.recipe.augment import AugmentSpec

_REASON = 160  # characters of somebody else's error
_NOISE = ((375, 500, 3), (601, 333, 3), (30, 41, 3), (200, 301))  # gray and in color, large and small


@dataclass(frozen=True)
class Transform:
    """Decoded image -> (C, H, W) float tensor, in two steps of which the second can wait until images are batches.

    Attributes:
        pixels: Decoded image to (C, H, W): uint8 where `scale` follows, else the float tensor itself.
        scale: uint8 to float; None where the processor can't be taken apart.
    """

    pixels: Callable[[Decoded], torch.Tensor]
    scale: "PixelScale | None"

    def __call__(self, image: Decoded) -> torch.Tensor:
        """Both steps."""
        return self.floats(self.pixels(image))

    def floats(self, pixels: torch.Tensor) -> torch.Tensor:
        """The second step, for an image or a batch; floats are left alone."""
        return pixels if self.scale is None else self.scale(pixels)


def evaluation_transform(processor: Any) -> Transform:
    """What the checkpoint's own processor makes of one image, equal to float rounding.

    Most processors can be taken apart into a resize and crop of 8-bit pixels, and a scale, which is several times
    faster. It is done where images of noise come out the same. Transparent images are laid over the background that
    the processor's settings name, if they do (`resize_mode`).
    """
    return _opaque(_evaluation(processor), processor)


def training_transform(processor: Any, augment: AugmentSpec) -> Transform:
    """Crop at random, or resize as in evaluation; then what `augmentation_steps` says, at the size of the model.

    Random decisions come from torch's global generator; `Examples` seeds it for each image.

    Raises:
        ModelError: If the processor does not make images of one size, for a crop, or square ones, for 90-degree turns.
    """
    if augment.crop is None:
        transform = _evaluation(processor)
    else:
        scale = pixel_scale(processor)
        crop = random_crop(processor, (scale.height, scale.width), augment.crop)
        as_input = as_tensor if isinstance(processor, TorchvisionBackend) else as_pillow
        transform = Transform(transforms.Compose([as_input, crop, as_rgb_tensor]), scale)
    scale = transform.scale
    if augment.rotate90 and scale is not None and scale.height != scale.width:
        made = f"{scale.height} x {scale.width}"
        raise ModelError(f"data.augment.rotate90: needs square images; {type(processor).__name__} makes {made}")
    steps = augmentation_steps(augment, [128.0] * 3 if scale is None else scale.mean_color)
    if steps and scale is None:  # what the processor makes may be no image any more
        transform = Transform(transforms.Compose([as_rgb_tensor, *steps, transform.pixels]), None)
    elif steps:
        transform = Transform(transforms.Compose([transform.pixels, *steps]), scale)
    return _opaque(transform, processor)


def _evaluation(processor: Any) -> Transform:
    fit = _fit(processor)
    if fit is not None:
        with suppress(ModelError):  # it makes no images
            scale = pixel_scale(processor)
            if makes_same(processor, fit, scale, _NOISE, tolerance=1e-3):
                return Transform(fit, scale)
    return Transform(partial(_process, processor), None)


def _opaque(transform: Transform, processor: Any) -> Transform:
    """The transform behind one that lays transparent pixels over the processor's background."""
    lay = partial(on_background, background=background_of(processor))
    return Transform(transforms.Compose([lay, transform.pixels]), transform.scale)


def background_of(processor: Any) -> tuple[int, int, int] | None:
    """The color that a processor's settings put behind transparent pixels (`resize_mode`)."""
    color = getattr(processor, "background", None)
    return None if color is None else (int(color[0]), int(color[1]), int(color[2]))


@dataclass(frozen=True)
class PixelScale:
    """What a processor makes of black and of white: its output is linear in the pixel values in between.

    Attributes:
        height: Output height in pixels.
        width: Output width in pixels.
        black: Value of 0 in each channel, (C, 1, 1).
        white: Value of 255 in each channel, (C, 1, 1).
        channels: Which color each channel shows; (0, 1, 2) is red, green and blue.
    """

    height: int
    width: int
    black: torch.Tensor
    white: torch.Tensor
    channels: tuple[int, ...]

    @property
    def mean_color(self) -> list[float]:
        """The red, green and blue that become 0, from 0 to 255."""
        zero = (-255 * self.black / (self.white - self.black)).flatten().clamp(0, 255).tolist()
        return [zero[self.channels.index(color)] for color in range(3)]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """8-bit pixels (..., C, H, W) -> float32 as the processor would scale them; floats are left alone."""
        if pixels.is_floating_point():
            return pixels
        if self.channels != (0, 1, 2):
            pixels = pixels[..., self.channels, :, :]
        factor, offset = _scale_on(pixels.device, *(tuple(one.flatten().tolist()) for one in (self.black, self.white)))
        return pixels.to(torch.float32).mul_(factor).add_(offset)

    def bytes(self, floats: torch.Tensor) -> torch.Tensor:
        """The way back: (..., C, H, W) float32 on the CPU -> 8-bit red, green and blue."""
        levels = ((floats - self.black) / (self.white - self.black) * 255).round().clamp(0, 255).to(torch.uint8)
        return levels[..., [self.channels.index(color) for color in range(3)], :, :]


@lru_cache(maxsize=8)
def _scale_on(
    device: torch.device, black: tuple[float, ...], white: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What 8-bit pixels are multiplied by, and what is added then, (C, 1, 1); sent to a device once."""
    offset = torch.tensor(black)[:, None, None]
    return ((torch.tensor(white)[:, None, None] - offset) / 255).to(device), offset.to(device)


def pixel_scale(processor: Any) -> PixelScale:
    """Find a processor's output size and pixel scale by showing it a black, a white and a colored image.

    Raises:
        ModelError: If it does not make (C, H, W) images of those three colors, or can't take them.
    """
    levels = (0, 100, 255)
    shown = [processed(processor, Image.new("RGB", (512, 512), color)) for color in ("black", "white", levels)]
    shape = tuple(shown[0].shape)
    if len(shape) != 3 or shape[0] != 3:
        raise ModelError(
            f"{type(processor).__name__} makes inputs of shape {shape}, not images: leave data.augment.crop out"
        )
    black, white, colored = (pixels[:, shape[1] // 2, shape[2] // 2].clone() for pixels in shown)  # (C,)
    seen = ((colored - black) / (white - black) * 255).round().tolist()
    if not set(seen) <= set(levels):
        raise ModelError(f"{type(processor).__name__} mixes colors: leave data.augment.crop out")
    channels = tuple(levels.index(level) for level in seen)
    return PixelScale(shape[1], shape[2], black[:, None, None], white[:, None, None], channels)


def _process(processor: Any, image: Decoded) -> torch.Tensor:
    """One image through the processor itself, (C, H, W)."""
    return processor(images=as_pillow(image).convert("RGB"), return_tensors="pt")["pixel_values"][0]


def processed(processor: Any, image: Decoded) -> torch.Tensor:
    """The same for a processor that nobody has tried yet: a ModelError if it can't, or makes no pixels."""
    try:
        return _process(processor, image)
    except Exception as error:  # processors are anybody's code, and check little
        shown = as_pillow(image)
        raise ModelError(
            f"model.checkpoint: its image processor, {type(processor).__name__}, can't take an image of {shown.width} "
            f"x {shown.height} pixels: {first_line(error)[:_REASON]}; mend its preprocessor_config.json: a size of "
            "height and width, resample from 0 to 3, a mean and a std of three numbers"
        ) from error


def noise(shape: Sequence[int], seed: int = 0) -> Image.Image:
    """An image of noise: (H, W), or (H, W, 3)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def makes_same(
    processor: Any,
    fit: Callable[[Decoded], torch.Tensor],
    scale: PixelScale,
    shapes: Sequence[Sequence[int]],
    *,
    tolerance: float,
) -> bool:
    """Whether a processor makes of noise what a resize and crop to uint8, and a scale, do.

    The tolerance is a share of the distance between neighboring pixel values.
    """
    level = (scale.white - scale.black).abs().min() / 255
    for shape in shapes:
        image = noise(shape)
        try:
            expected, pixels = processed(processor, image), fit(image)  # (C, H, W) each
        except (ModelError, TypeError, ValueError, AttributeError):  # a size, or other arguments, that it doesn't know
            return False
        if pixels.dtype != torch.uint8 or pixels.shape != expected.shape:
            return False
        if (scale(pixels) - expected).abs().max() > level * tolerance:
            return False
    return True


def _fit(processor: Any) -> Callable[[Decoded], torch.Tensor] | None:
    """What may be the processor's resize and crop, decoded image -> (3, H, W) uint8; None where nothing is known."""
    if isinstance(processor, TorchvisionBackend):
        return partial(_fit_by_torchvision, processor)
    steps = getattr(getattr(processor, "val_transforms", None), "transforms", ())  # timm's
    names = [type(step).__name__ for step in steps]
    if names[-2:] == ["MaybeToTensor", "Normalize"]:
        return transforms.Compose([_as_rgb_pillow, *steps[:-2], as_rgb_tensor])
    return None


def _as_rgb_pillow(image: Decoded) -> Image.Image:
    shown = as_pillow(image)
    return shown if shown.mode == "RGB" else shown.convert("RGB")  # a letterbox's bars have three channels


def _fit_by_torchvision(processor: Any, image: Decoded) -> torch.Tensor:
    """Resize and crop with the processor's own methods, without its checks and its copy in another layout."""
    pixels = as_tensor(image).unsqueeze(0)  # (1, C, H, W)
    if processor.do_resize:
        extra = {"crop_pct": processor.crop_pct} if hasattr(processor, "crop_pct") else {}
        size = _letterboxed(processor.size, *pixels.shape[-2:])
        pixels = processor.resize(pixels, size, resample=processor.resample, **extra)
    if processor.do_center_crop:
        pixels = processor.center_crop(pixels, processor.crop_size)
    return as_rgb_tensor(pixels[0])


def _letterboxed(size: Any, height: int, width: int) -> Any:
    """The size to resize to; transformers' own rule for a letterbox gives narrow strips no pixel at all."""
    if not (size.max_height and size.max_width):
        return size
    high, wide = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    return type(size)(height=max(high, 1), width=max(wide, 1))
