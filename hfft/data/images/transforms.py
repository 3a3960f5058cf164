"""One image -> the tensor that a model takes: the checkpoint's own processor, and augmentation for training."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import get_image_size_for_max_height_width

from hfft.data.images.decoding import Decoded
from hfft.data.images.modes import on_background
from hfft.errors import ModelError, first_line
from hfft.recipe.spec import AugmentSpec

_SHOWN = 160  # characters of somebody else's reason
_BICUBIC, _BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


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
    """Crop at random, or resize as in evaluation; then flips and RandAugment, at the size that the model takes.

    Random decisions come from torch's global generator; `Examples` seeds it for each image.

    Raises:
        ModelError: If a crop was asked for and the processor does not make images of one size.
    """
    evaluate = _evaluation(processor)
    steps = _augmentation(augment)
    if augment.crop is not None:
        scale = pixel_scale(processor)
        crop = _random_crop(processor, scale, augment.crop)
        as_input = _as_tensor if isinstance(processor, TorchvisionBackend) else _as_image
        return _opaque(Transform(transforms.Compose([as_input, crop, _as_rgb_tensor, *steps]), scale), processor)
    if not steps:
        return _opaque(evaluate, processor)
    if evaluate.scale is None:  # what the processor makes may be no image any more
        return _opaque(Transform(transforms.Compose([_as_rgb_tensor, *steps, evaluate]), None), processor)
    return _opaque(Transform(transforms.Compose([evaluate.pixels, *steps]), evaluate.scale), processor)


def _evaluation(processor: Any) -> Transform:
    fit = _fit(processor)
    if fit is not None:
        with suppress(ModelError):  # it makes no images
            scale = pixel_scale(processor)
            if _is_faithful(fit, scale, processor):
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


def _random_crop(processor: Any, scale: "PixelScale", share: tuple[float, float]) -> Callable[[Any], Any]:
    """Crops as the evaluation shows images: letterboxed ones with their bars, squashed ones squashed."""
    size, how = (scale.height, scale.width), _interpolation(processor)
    fit = getattr(processor, "fit", None)
    if fit is None:
        return transforms.RandomResizedCrop(size, scale=share, interpolation=how)
    return _FittedCrop(size, share, how, fit, tuple(letterbox_color(processor)))


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
    fit: str
    fill: tuple[int, ...]

    def __call__(self, image: Any) -> Any:
        """A Pillow image or a tensor (C, H, W) to the same kind, at `size`."""
        height, width = functional.get_size(image)
        if self.fit == "letterbox":
            image = image.convert("RGB") if isinstance(image, Image.Image) else image.expand(3, -1, -1)
            high = max(round(width * self.size[0] / self.size[1]), height)
            wide = max(round(height * self.size[1] / self.size[0]), width)
            left, top = (wide - width) // 2, (high - height) // 2
            image = functional.pad(image, [left, top, wide - width - left, high - height - top], fill=list(self.fill))
            height, width = high, wide
        ratio = (3 / 4 * width / height, 4 / 3 * width / height)
        crop = transforms.RandomResizedCrop(self.size, self.share, ratio, self.interpolation)
        return crop(image)


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

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """8-bit pixels (..., C, H, W) -> float32 as the processor would scale them; floats are left alone."""
        if pixels.is_floating_point():
            return pixels
        if self.channels != (0, 1, 2):
            pixels = pixels[..., self.channels, :, :]
        factor, offset = _scale_on(pixels.device, *(tuple(one.flatten().tolist()) for one in (self.black, self.white)))
        return pixels.to(torch.float32).mul_(factor).add_(offset)


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
    return PixelScale(
        height=shape[1],
        width=shape[2],
        black=black[:, None, None],  # (C, 1, 1)
        white=white[:, None, None],
        channels=tuple(levels.index(level) for level in seen),
    )


def _interpolation(processor: Any) -> InterpolationMode:
    asked = getattr(processor, "resample", None)
    if asked is None:
        asked = getattr(processor, "data_config", {}).get("interpolation", "bicubic")
    if isinstance(asked, str):
        return InterpolationMode(asked) if asked in {mode.value for mode in InterpolationMode} else _BICUBIC
    by_pillow = {Image.Resampling.NEAREST: InterpolationMode.NEAREST, Image.Resampling.BILINEAR: _BILINEAR}
    return by_pillow.get(Image.Resampling(asked), _BICUBIC)


def _process(processor: Any, image: Decoded) -> torch.Tensor:
    """One image through the processor itself, (C, H, W)."""
    return processor(images=_as_image(image).convert("RGB"), return_tensors="pt")["pixel_values"][0]


def processed(processor: Any, image: Image.Image) -> torch.Tensor:
    """The same for a processor that nobody has tried yet.

    Raises:
        ModelError: If it can't take the image, or makes no pixels of it.
    """
    try:
        return _process(processor, image)
    except Exception as error:  # processors are anybody's code, and check little
        raise ModelError(
            f"model.checkpoint: its image processor, {type(processor).__name__}, can't take an image of {image.width} "
            f"x {image.height} pixels: {first_line(error)[:_SHOWN]}; mend its preprocessor_config.json: a size of "
            "height and width, resample from 0 to 3, a mean and a std of three numbers"
        ) from error


def _fit(processor: Any) -> Callable[[Decoded], torch.Tensor] | None:
    """What may be the processor's resize and crop, decoded image -> (3, H, W) uint8; None where nothing is known."""
    if isinstance(processor, TorchvisionBackend):
        return partial(_fit_by_torchvision, processor)
    steps = getattr(getattr(processor, "val_transforms", None), "transforms", ())  # timm's
    names = [type(step).__name__ for step in steps]
    if names[-2:] == ["MaybeToTensor", "Normalize"]:
        return transforms.Compose([_as_image, *steps[:-2], _as_rgb_tensor])
    return None


def _fit_by_torchvision(processor: Any, image: Decoded) -> torch.Tensor:
    """Resize and crop with the processor's own methods, without its checks and its copy in another layout."""
    pixels = _as_tensor(image).unsqueeze(0)  # (1, C, H, W)
    if processor.do_resize:
        extra = {"crop_pct": processor.crop_pct} if hasattr(processor, "crop_pct") else {}
        size = _letterboxed(processor.size, *pixels.shape[-2:])
        pixels = processor.resize(pixels, size, resample=processor.resample, **extra)
    if processor.do_center_crop:
        pixels = processor.center_crop(pixels, processor.crop_size)
    return _as_rgb_tensor(pixels[0])


def _letterboxed(size: Any, height: int, width: int) -> Any:
    """The size to resize to; transformers' own rule for a letterbox gives narrow strips no pixel at all."""
    if not (size.max_height and size.max_width):
        return size
    high, wide = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    return type(size)(height=max(high, 1), width=max(wide, 1))


def _is_faithful(fit: Callable[[Decoded], torch.Tensor], scale: PixelScale, processor: Any) -> bool:
    """Whether both steps together make the same of noise, gray and in color, large and small, as the processor."""
    rng = np.random.default_rng(0)
    level = (scale.white - scale.black).abs().min() / 255  # between neighboring pixel values
    for shape in ((375, 500, 3), (601, 333, 3), (30, 41, 3), (300, 301)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        expected = processed(processor, image)  # (C, H, W)
        try:
            pixels = fit(image)
        except (TypeError, ValueError, AttributeError):  # a method that takes other arguments
            return False
        if pixels.dtype != torch.uint8 or pixels.shape != expected.shape:
            return False
        if (scale(pixels) - expected).abs().max() > level / 1000:
            return False
    return True


def _augmentation(augment: AugmentSpec) -> list[Any]:
    """Steps from (3, H, W) uint8 to the same."""
    steps: list[Any] = []
    if augment.flip in (True, "horizontal", "both"):
        steps.append(transforms.RandomHorizontalFlip())
    if augment.flip in ("vertical", "both"):
        steps.append(transforms.RandomVerticalFlip())
    if augment.randaugment is not None:  # faster in Pillow
        steps += [_as_image, transforms.RandAugment(magnitude=augment.randaugment), _as_rgb_tensor]
    return steps


def _as_image(image: Decoded) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray((image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)).numpy())


def _as_tensor(image: Decoded) -> torch.Tensor:
    """(1 or 3, H, W) uint8; a view on (H, W, 3) for a Pillow image, which torchvision resizes without a copy."""
    if isinstance(image, torch.Tensor):
        return image
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _as_rgb_tensor(image: Decoded) -> torch.Tensor:
    return _as_tensor(image).expand(3, -1, -1)
