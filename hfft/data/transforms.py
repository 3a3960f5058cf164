"""One image -> the tensor that a model takes: the checkpoint's own processor, and augmentation for training."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from hfft.errors import DataError, ModelError
from hfft.recipe.spec import AugmentSpec

Transform = Callable[[Image.Image], torch.Tensor]


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
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


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


def decode_row(row: dict[str, Any]) -> Image.Image:
    """The image of a data set's row; an error names the row's file.

    Raises:
        DataError: If it can't be decoded.
    """
    image = row["image"]
    if image is None:
        raise DataError(f"{row['file']}: the row holds no image")
    try:
        return decode(image["path"] if image["bytes"] is None else image["bytes"])
    except DataError as error:
        raise DataError(f"{row['file']}: {error}") from error


def evaluation_transform(processor: Any) -> Transform:
    """The checkpoint's own processor, one image at a time: RGB image -> (C, H, W) float tensor."""

    def transform(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]  # (C, H, W)

    return transform


def training_transform(processor: Any, augment: AugmentSpec) -> Transform:
    """Augmentation, then the same size and pixel scale as the evaluation transform.

    Random decisions come from torch's global generator; `data.batches.Examples` seeds it for each image.

    Args:
        processor: The checkpoint's image processor.
        augment: What to do.

    Raises:
        ModelError: If a crop was asked for and the processor does not make images of one size.
    """
    evaluate = evaluation_transform(processor)
    steps: list[Any] = []
    scale: PixelScale | None = None
    if augment.crop is not None:
        scale = pixel_scale(processor)
        steps.append(
            transforms.RandomResizedCrop(
                (scale.height, scale.width), scale=augment.crop, interpolation=_interpolation(processor)
            )
        )
    if augment.flip in (True, "horizontal", "both"):
        steps.append(transforms.RandomHorizontalFlip())
    if augment.flip in ("vertical", "both"):
        steps.append(transforms.RandomVerticalFlip())
    if augment.randaugment is not None:
        steps.append(transforms.RandAugment(magnitude=augment.randaugment))
    if not steps:
        return evaluate
    to_tensor = evaluate if scale is None else scale.to_tensor
    return transforms.Compose([*steps, transforms.Lambda(to_tensor)])


@dataclass(frozen=True)
class PixelScale:
    """What a processor makes of black and of white: its output is linear in the pixel values in between.

    Attributes:
        height: Output height in pixels.
        width: Output width in pixels.
        black: Value of 0 in each channel, (C, 1, 1).
        white: Value of 255 in each channel, (C, 1, 1).
    """

    height: int
    width: int
    black: torch.Tensor
    white: torch.Tensor

    def to_tensor(self, image: Image.Image) -> torch.Tensor:
        """RGB image of the output size -> (C, H, W) float tensor, as the processor would scale it."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)  # (C, H, W)
        return pixels / 255 * (self.white - self.black) + self.black


def pixel_scale(processor: Any) -> PixelScale:
    """Find a processor's output size and pixel scale by showing it a black and a white image.

    Raises:
        ModelError: If it does not make (C, H, W) images.
    """
    evaluate = evaluation_transform(processor)
    black, white = (evaluate(Image.new("RGB", (512, 512), color)) for color in ("black", "white"))
    if black.ndim != 3 or black.shape[0] != 3:
        raise ModelError(
            f"{type(processor).__name__} makes inputs of shape {tuple(black.shape)}, not images: "
            "leave data.augment.crop out"
        )
    middle = (slice(None), slice(black.shape[1] // 2, None), slice(black.shape[2] // 2, None))
    return PixelScale(
        height=black.shape[1],
        width=black.shape[2],
        black=black[middle][:, :1, :1].clone(),  # (C, 1, 1)
        white=white[middle][:, :1, :1].clone(),
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


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """What Pillow raises for bytes that are no image, as a DataError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise DataError("not an image in any format that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise DataError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
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
    return image.convert("RGB")
