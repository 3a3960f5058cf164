"""One image -> the tensor that a model takes: the checkpoint's own processor, and augmentation for training."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from transformers.image_processing_backends import TorchvisionBackend

from hfft.data.content import read_content
from hfft.errors import DataError, ModelError
from hfft.recipe.spec import AugmentSpec

Decoded = Image.Image | torch.Tensor  # upright, 8 bits, gray or RGB: a Pillow image, or (1 or 3, H, W)


def decode(source: bytes | str | os.PathLike[str] | Image.Image, *, draft: bool = False) -> Image.Image:
    """An upright 8-bit RGB image from a file's content, a path or an open image.

    Orientation follows EXIF. Gray, palette and CMYK images are converted by Pillow and transparency is dropped, just
    as transformers' pipelines do. Deeper images, which Pillow would clip at 255, are scaled by a fixed rule: 16 bits
    are divided by 257; floating point is taken as 0..1 when it fits, else as 0..255, else as 0..65535.

    Args:
        source: Encoded bytes, a path, or an image.
        draft: Decode a JPEG at reduced size; for checking, not for looking.

    Raises:
        DataError: If it can't be decoded; the message holds the reason, the caller knows the name.
    """
    image = source if isinstance(source, Image.Image) else open_image(source)
    with _pillow_errors():
        if draft:
            image.draft("RGB", (64, 64))
        return _in_mode(_upright(image), "RGB")


def open_image(source: bytes | str | os.PathLike[str]) -> Image.Image:
    """An image whose header is read and whose pixels are not.

    Raises:
        DataError: If it is none; the message holds the reason, the caller knows the name.
    """
    with _pillow_errors():
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))


def is_deep(image: Image.Image) -> bool:
    """Whether a channel has more than 8 bits, as Pillow's modes I, I;16 (any byte order) and F have."""
    return image.mode == "F" or image.mode.startswith("I")


def decode_row(row: dict[str, Any]) -> Decoded:
    """The image of a data set's row, with the pixels of `decode`; gray ones in one channel. An error names the file.

    Raises:
        DataError: If it can't be decoded.
    """
    image = row["image"]
    if image is None:
        raise DataError(f"{row['file']}: the row holds no image")
    try:
        with _pillow_errors():
            return _decode_fast(read_content(image))
    except DataError as error:
        raise DataError(f"{row['file']}: {error}") from error


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
    faster. It is done where images of noise come out the same.
    """
    fit = _fit(processor)
    if fit is not None:
        with suppress(ModelError):  # it makes no images
            scale = pixel_scale(processor)
            if _is_faithful(fit, scale, processor):
                return Transform(fit, scale)
    return Transform(partial(_process, processor), None)


def training_transform(processor: Any, augment: AugmentSpec) -> Transform:
    """Crop at random, or resize as in evaluation; then flips and RandAugment, at the size that the model takes.

    Random decisions come from torch's global generator; `data.batches.Examples` seeds it for each image.

    Args:
        processor: The checkpoint's image processor.
        augment: What to do.

    Raises:
        ModelError: If a crop was asked for and the processor does not make images of one size.
    """
    evaluate = evaluation_transform(processor)
    steps = _augmentation(augment)
    if augment.crop is not None:
        scale = pixel_scale(processor)
        crop = transforms.RandomResizedCrop(
            (scale.height, scale.width), scale=augment.crop, interpolation=_interpolation(processor)
        )
        as_input = _as_tensor if isinstance(processor, TorchvisionBackend) else _as_image
        return Transform(transforms.Compose([as_input, crop, _as_rgb_tensor, *steps]), scale)
    if not steps:
        return evaluate
    if evaluate.scale is None:  # what the processor makes may be no image any more
        return Transform(transforms.Compose([_as_rgb_tensor, *steps, evaluate]), None)
    return Transform(transforms.Compose([evaluate.pixels, *steps]), evaluate.scale)


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
        black, white = self.black.to(pixels.device), self.white.to(pixels.device)
        return pixels.to(torch.float32).mul_((white - black) / 255).add_(black)


def pixel_scale(processor: Any) -> PixelScale:
    """Find a processor's output size and pixel scale by showing it a black, a white and a colored image.

    Raises:
        ModelError: If it does not make (C, H, W) images of those three colors.
    """
    levels = (0, 100, 255)
    shown = [_process(processor, Image.new("RGB", (512, 512), color)) for color in ("black", "white", levels)]
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


_BICUBIC, _BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def _process(processor: Any, image: Decoded) -> torch.Tensor:
    """One image through the processor itself, (C, H, W)."""
    return processor(images=_in_mode(_as_image(image), "RGB"), return_tensors="pt")["pixel_values"][0]


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
        pixels = processor.resize(pixels, processor.size, resample=processor.resample, **extra)
    if processor.do_center_crop:
        pixels = processor.center_crop(pixels, processor.crop_size)
    return _as_rgb_tensor(pixels[0])


def _is_faithful(fit: Callable[[Decoded], torch.Tensor], scale: PixelScale, processor: Any) -> bool:
    """Whether both steps together make the same of noise, gray and in color, large and small, as the processor."""
    rng = np.random.default_rng(0)
    level = (scale.white - scale.black).abs().min() / 255  # between neighboring pixel values
    for shape in ((375, 500, 3), (601, 333, 3), (30, 41, 3), (300, 301)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        expected = _process(processor, image)  # (C, H, W)
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


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """What Pillow raises for bytes that are no image, as a DataError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise DataError("not an image in any format that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise DataError(str(error) or type(error).__name__) from error


def _decode_fast(content: bytes) -> Decoded:
    """Decode with simplejpeg, nearly twice as fast, what it decodes as Pillow does."""
    image = open_image(content)
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _simplejpeg_equals_pillow():
        try:
            pixels = _decode_jpeg(content, "GRAY" if image.mode == "L" else "RGB")
        except ValueError:  # a damaged file; Pillow repairs it or says what it is
            return _in_mode(_upright(image), image.mode)
        return _turned(pixels, image.getexif().get(ExifTag.Orientation, 1))
    return _in_mode(_upright(image), "L" if image.mode in ("1", "L") or is_deep(image) else "RGB")


def _decode_jpeg(content: bytes, colors: str) -> torch.Tensor:
    """(1 or 3, H, W) uint8, a view on (H, W, 1 or 3)."""
    return torch.from_numpy(simplejpeg.decode_jpeg(content, colors)).permute(2, 0, 1)


@cache
def _simplejpeg_equals_pillow() -> bool:
    """Whether both have a libjpeg of the same kind; Pillow may have been built with another one."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (93, 77, 3), dtype=np.uint8))
    for options in ({}, {"progressive": True}, {"subsampling": "4:2:2"}, {"quality": 95, "subsampling": "4:4:4"}):
        stream = io.BytesIO()
        noise.save(stream, "JPEG", **options)
        if not torch.equal(_decode_jpeg(stream.getvalue(), "RGB"), _as_tensor(Image.open(stream))):
            return False
    return True


def _turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Pixels (C, H, W) with EXIF's orientation, 1 to 8, undone."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
    return pixels.flip(flipped[orientation]) if orientation in flipped else pixels


def _upright(image: Image.Image) -> Image.Image:
    """The loaded image, turned if it has to be; Pillow's own function copies the others too."""
    image.load()
    return image if image.getexif().get(ExifTag.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An 8-bit image in mode L or RGB."""
    if is_deep(image):
        values = np.asarray(image, dtype=np.float64)  # (H, W)
        if not np.isfinite(values).all():
            raise DataError("holds values that are not finite numbers")
        is_float = image.mode == "F"
        if is_float and values.max(initial=0) <= 1:
            values = values * 255
        elif not is_float or values.max(initial=0) > 255:
            values = values / 257
        image = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)
