"""An open image -> upright, 8-bit, mode L, RGB or RGBA: the rule of training, audit and export; runs without hfft."""

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin
from PIL.ExifTags import Base as ExifTag

from hfft.data.images.formats import PILLOW_ERRORS, check_content, check_image, open_header, pillow_errors

_RANGES = (1, 255, 65535)  # floating-point values are taken to lie between 0 and one of these
_ROWS = 256  # scaled at once in double precision
_AnyImage = TypeVar("_AnyImage")


def open_picture(file: str | os.PathLike[str], background: Sequence[int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image, transparent pixels over a background, if there is one.

    Raises:
        ValueError: If it can't be read; the message holds the reason, the caller knows the name.
    """
    try:
        with open(file, "rb") as stream:
            encoded = stream.read()
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or type(error).__name__}") from error
    return on_background(read_picture(open_header(encoded), encoded), background).convert("RGB")


def read_picture(image: Image.Image, encoded: bytes | None = None) -> Image.Image:
    """An open image, upright: mode L, RGB, or RGBA where a pixel is transparent; a ValueError if it can't be decoded.

    `encoded` is its content, if it is at hand: damage that Pillow hides is found there.
    """
    with pillow_errors():
        check_image(image)
        if encoded is not None:
            check_content(image, encoded)
        _scale_transparent_color(image)
        image.load()
        upright = from_black(image)
        if orientation_of(upright) != 1:  # Pillow's function copies the others too
            upright = ImageOps.exif_transpose(upright)
        if _is_transparent(upright):
            return _in_mode(upright, "RGBA")
        return _in_mode(upright, "L" if upright.mode in ("1", "L") or is_deep(upright) else "RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether a channel has more than 8 bits, as Pillow's modes I, I;16 (any byte order) and F have."""
    return image.mode == "F" or image.mode.startswith("I")


def has_profile(image: Image.Image) -> bool:
    """Whether it is CMYK with a color profile."""
    return image.mode == "CMYK" and bool(image.info.get("icc_profile"))


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or EXIF can't be read."""
    with suppress(*PILLOW_ERRORS, TypeError, KeyError, OverflowError):
        found = image.getexif().get(ExifTag.Orientation, 1)
        return found if isinstance(found, int) else 1
    return 1


def on_background(image: _AnyImage, background: Sequence[int] | None) -> _AnyImage | Image.Image:
    """An image in mode RGBA over a color, or, as in transformers' pipelines, with its colors below transparency."""
    if not isinstance(image, Image.Image) or image.mode != "RGBA":
        return image
    if background is None:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background[:3], 255)), image).convert("RGB")


def from_black(image: Image.Image) -> Image.Image:
    """A loaded image whose levels count from black; as it is where they do already."""
    is_signed = image.mode == "L" and _tiff_tag(image, ExifTag.SampleFormat) == (2,)  # Pillow reads -1 as 255
    if is_signed and cast("tuple[int, int]", image.getextrema())[1] > 127:
        raise ValueError("holds negative values; allowed: 0 to 127 in a TIFF of 8-bit integers with a sign")
    is_white_zero = _tiff_tag(image, ExifTag.PhotometricInterpretation) == 0
    if not is_white_zero or not is_deep(image):  # Pillow inverts images of 8 bits alone
        return image
    values = np.asarray(image)
    return Image.fromarray((_top(image, values) - values).astype(np.float32 if image.mode == "F" else np.int32))


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    return image.tag_v2.get(tag) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def float_range(high: float) -> int | None:
    """The upper end of the range that floats up to `high` are taken to be in, with half a level to spare."""
    return next((top for top in _RANGES if high <= top + top / 510), None)


def _scale_transparent_color(image: Image.Image) -> None:
    """Scale the transparent color of a PNG as Pillow scales its pixels: from 2 or 4 bits, or to 8 of 16."""
    color, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format != "PNG" or color is None or not tiles:  # no tiles: loaded before
        return
    raw = tiles[0].args
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in color)


def _is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a loaded image shows what is behind it."""
    if not image.has_transparency_data:
        return False
    if is_deep(image):
        return bool(_is_transparent_color(image).any())
    if image.mode not in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
    lowest, _ = cast("tuple[int, int]", image.getchannel("A").getextrema())
    return lowest < 255


def _is_transparent_color(image: Image.Image) -> np.ndarray:
    """Where a deep image has the color that its file calls transparent, (H, W)."""
    return np.asarray(image) == image.info["transparency"]


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An 8-bit image in mode L, RGB or RGBA."""
    if is_deep(image):
        levels = _eight_bits(image)
        if mode == "RGBA":
            levels.putalpha(Image.fromarray(~_is_transparent_color(image)).convert("L"))
        image = levels
    if has_profile(image):
        image = _with_profile(image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Mode L from more bits: 16-bit integers divided by 257, floats from the smallest range that holds them."""
    values = np.asarray(image)  # (H, W) of uint16, int32 or float32
    top = _top(image, values)
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        scaled = values[start : start + _ROWS] * np.float64(255 / top)
        levels[start : start + _ROWS] = np.clip(np.round(scaled), 0, 255)
    return Image.fromarray(levels)


def _top(image: Image.Image, values: np.ndarray) -> int:
    """The upper end of the range that deep values are in; a value in none is an error, so that nothing is clipped."""
    if not np.isfinite([values.min(), values.max()]).all():  # NaN where any value is
        raise ValueError("holds values that are not finite numbers")
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    top = float_range(high) if image.mode == "F" else 65535
    if top is None or low < -top / 510 or high > top + top / 510:
        raise ValueError(f"holds values from {low:g} to {high:g}; allowed: 0 to 1, 0 to 255, or 0 to 65535")
    return top


def _with_profile(image: Image.Image) -> Image.Image:
    """CMYK in the colors that its profile gives; as without one where Pillow can't read it."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        shown = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return image
    return image if shown is None else shown
