"""A file's content -> an upright 8-bit image; the one rule of training, evaluation, audit and prediction."""

import io
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

from hfft.data import content
from hfft.data.formats import formats
from hfft.errors import DataError

# Changed with the pixels that any file gives: recordings and cached audits of another number are not used.
RULE = 2
MAX_PIXELS = 178_956_970  # where Pillow speaks of a decompression bomb
MAX_ASPECT = 100  # long side by short side: beyond it, a processor that resizes the short side fills the memory

# Upright, 8 bits: a Pillow image in mode L, RGB or RGBA, or (1 or 3, H, W) uint8.
Decoded = Image.Image | torch.Tensor

_LOST = "the JPEG is damaged and part of its picture lost"
_TRUNCATED = "image file is truncated"
_RANGES = (1, 255, 65535)
_ROWS = 256
# What Pillow remarks on odd files; what matters of it is an error here, or a finding of the audit.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(
    source: bytes | str | os.PathLike[str] | Image.Image, background: tuple[int, int, int] | None = None
) -> Image.Image:
    """An upright 8-bit RGB image from a file's content, a path or an open image; docs/data.md states the rule.

    Args:
        source: Encoded bytes, a path, or an image.
        background: Color that shows through transparent pixels; what the file holds below them when None.

    Raises:
        DataError: If it can't be decoded; the message holds the reason, the caller knows the name.
    """
    if isinstance(source, Image.Image):
        decoded = decode_open(source)
    else:
        decoded = decode_bytes(source if isinstance(source, bytes) else read_file(source))
    opaque = on_background(decoded, background)
    if isinstance(opaque, torch.Tensor):
        return Image.fromarray(opaque.expand(3, -1, -1).permute(1, 2, 0).numpy())
    return opaque.convert("RGB")


def decode_open(image: Image.Image) -> Image.Image:
    """The same for an image that is open already: mode L, RGB, or RGBA where a pixel is transparent.

    Raises:
        DataError: If it can't be decoded.
    """
    with _pillow_errors():
        check_size(*image.size)
        upright = _upright(image)
        if _is_transparent(upright):
            return _in_mode(upright, "RGBA")
        return _in_mode(upright, "L" if upright.mode in ("1", "L") or is_deep(upright) else "RGB")


def decode_row(row: dict[str, Any]) -> Decoded:
    """The image of a data set's row; gray ones in one channel. An error names the file.

    Raises:
        DataError: If it can't be decoded.
    """
    try:
        return decode_bytes(read_row(row))
    except DataError as error:
        raise DataError(f"{row['file']}: {error}") from error


def read_row(row: dict[str, Any]) -> bytes:
    """The encoded image of a row.

    Raises:
        DataError: If it has none, or its file can't be read.
    """
    if row["image"] is None:
        raise DataError("the row holds no image")
    with _reading():
        return content.read_content(row["image"])


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: If it can't be read.
    """
    with _reading():
        return content.read_file(path)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except (OSError, ValueError) as error:  # a name that holds a zero byte is a ValueError
        raise DataError(f"can't be read: {getattr(error, 'strerror', None) or error}") from error


def open_image(encoded: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not.

    Raises:
        DataError: If it is none, or too large; the message holds the reason, the caller knows the name.
    """
    if not encoded:
        raise DataError("the file is empty")
    with _pillow_errors():
        image = Image.open(io.BytesIO(encoded), formats=formats())
        check_size(*image.size)
        return image


def check_size(width: int, height: int) -> None:
    """Refuse images that would fill the memory.

    Raises:
        DataError: If there are too many pixels, or one side is too much longer than the other.
    """
    if width * height > MAX_PIXELS:
        raise DataError(f"has {width} x {height} pixels; allowed: {MAX_PIXELS:,} (a decompression bomb?)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"has {width} x {height} pixels; allowed: one side at most {MAX_ASPECT} times the other")


def decode_bytes(encoded: bytes) -> Decoded:
    """Decode with simplejpeg, nearly twice as fast, what it decodes as Pillow does; all else with Pillow.

    Raises:
        DataError: If it can't be decoded; the message holds the reason, the caller knows the name.
    """
    image = open_image(encoded)
    with _pillow_errors():
        if image.format in ("JPEG", "MPO"):
            pixels = _decode_jpeg_strictly(encoded, image.mode)
            if pixels is not None:
                return _turned(pixels, orientation_of(image))
        if image.format == "PNG":
            _check_png(encoded)
    return decode_open(image)


def decode_small(encoded: bytes) -> tuple[Image.Image, Decoded, str | None]:
    """What the audit needs of an image: its header, its picture (a JPEG's at reduced size), and a remark.

    It raises exactly where `decode_bytes` does.

    Returns:
        The image with its header, the decoded picture, and what a JPEG decoder remarked that may cost no pixel.

    Raises:
        DataError: If it can't be decoded.
    """
    image = open_image(encoded)
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _simplejpeg_equals_pillow():
        try:
            pixels = simplejpeg.decode_jpeg(encoded, "GRAY", min_height=_SMALL, min_width=_SMALL)  # (H, W, 1)
        except ValueError as error:
            _refuse_lost(error)
            remark = str(error) if str(error).startswith("Corrupt") else None  # others say what simplejpeg can't do
            return image, decode_bytes(encoded), remark
        return image, _turned(torch.from_numpy(pixels).permute(2, 0, 1), orientation_of(image)), None
    return image, decode_bytes(encoded), None


_SMALL = 64  # pixels that the reduced size has at least


def is_deep(image: Image.Image) -> bool:
    """Whether a channel has more than 8 bits, as Pillow's modes I, I;16 (any byte order) and F have."""
    return image.mode == "F" or image.mode.startswith("I")


def has_profile(image: Image.Image) -> bool:
    """Whether these are inks with a profile that says how they look."""
    return image.mode == "CMYK" and bool(image.info.get("icc_profile"))


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or EXIF can't be read."""
    with suppress(*_PILLOW_ERRORS, TypeError, KeyError, OverflowError):
        return int(image.getexif().get(ExifTag.Orientation, 1))
    return 1


def on_background(image: Decoded, background: tuple[int, int, int] | None) -> Decoded:
    """An image without transparency: laid over a color, or, when None, with the colors that the file holds below it.

    The latter is what transformers' pipelines do.
    """
    if not isinstance(image, Image.Image) or image.mode != "RGBA":
        return image
    if background is None:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError, MemoryError)


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """What Pillow raises for bytes that are no image, as a DataError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise DataError("not an image in any format that hfft reads") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"has more pixels than the {MAX_PIXELS:,} that are allowed (a decompression bomb?)") from error
    except (*_PILLOW_ERRORS, TypeError, KeyError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
        # Plugins that are written in Python meet damaged headers in any of these ways.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(reason if isinstance(error, _PILLOW_ERRORS) else f"damaged: {reason}") from error


def _decode_jpeg_strictly(encoded: bytes, mode: str) -> torch.Tensor | None:
    """(1 or 3, H, W), or None where Pillow has to; raises where the decoder had to make up pixels.

    Pillow hides that: libjpeg fills what it can't decode with gray, and goes on.
    """
    colors = {"L": "GRAY", "RGB": "RGB"}.get(mode)
    try:
        if colors is not None and _simplejpeg_equals_pillow():
            return _decode_jpeg(encoded, colors)
        simplejpeg.decode_jpeg(encoded, colors or "CMYK", min_height=_SMALL, min_width=_SMALL)
    except ValueError as error:
        _refuse_lost(error)
    return None


def _refuse_lost(error: ValueError) -> None:
    """Raise where a message of libjpeg (jerror.h) says that pixels are missing or wrong."""
    message = str(error)
    if message.startswith("Premature end of JPEG file"):
        raise DataError(_TRUNCATED) from error
    if any(words in message for words in ("premature end of data", "bad Huffman", "bad arithmetic", "found marker")):
        raise DataError(f"{_LOST}: {message.removeprefix('Corrupt JPEG data: ')}") from error


def _check_png(encoded: bytes) -> None:
    """Raise where a part that pixels depend on has another checksum than it says, which Pillow does not look at."""
    place = 8
    while place + 12 <= len(encoded):
        size = int.from_bytes(encoded[place : place + 4], "big")
        kind, end = encoded[place + 4 : place + 8], place + 8 + size
        if kind in (b"IHDR", b"PLTE", b"IDAT") and end + 4 <= len(encoded):
            told = int.from_bytes(encoded[end : end + 4], "big")
            if zlib.crc32(memoryview(encoded)[place + 4 : end]) != told:
                raise DataError(f"the PNG is damaged: wrong checksum of {kind.decode()}")
        place = end + 4


def _decode_jpeg(encoded: bytes, colors: str) -> torch.Tensor:
    """(1 or 3, H, W) uint8, a view on (H, W, 1 or 3)."""
    return torch.from_numpy(simplejpeg.decode_jpeg(encoded, colors)).permute(2, 0, 1)


@cache
def _simplejpeg_equals_pillow() -> bool:
    """Whether both have a libjpeg of the same kind; Pillow may have been built with another one."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (93, 77, 3), dtype=np.uint8))
    for options in ({}, {"progressive": True}, {"subsampling": "4:2:2"}, {"quality": 95, "subsampling": "4:4:4"}):
        stream = io.BytesIO()
        noise.save(stream, "JPEG", **options)
        plain = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)
        if not torch.equal(_decode_jpeg(stream.getvalue(), "RGB"), plain):
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
    return image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)


def _is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a loaded image shows what is behind it."""
    if not image.has_transparency_data:
        return False
    if image.mode not in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
    lowest, _ = cast("tuple[int, int]", image.getchannel("A").getextrema())
    return lowest < 255


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An 8-bit image in mode L, RGB or RGBA."""
    if is_deep(image):
        image = _eight_bits(image)
    if has_profile(image):
        image = _with_profile(image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Mode L from more bits: 16-bit integers divided by 257, floats from the smallest of the ranges that holds them.

    Raises:
        DataError: If a value is in none of them, so that nothing is clipped.
    """
    values = np.asarray(image)  # (H, W) of uint16, int32 or float32
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)  # NaN where any value is
    if not np.isfinite([values.min(), values.max()]).all():
        raise DataError("holds values that are not finite numbers")
    top = float_range(high) if image.mode == "F" else 65535
    if top is None or low < -top / 510 or high > top + top / 510:
        raise DataError(f"holds values from {low:g} to {high:g}; allowed: 0 to 1, 0 to 255, or 0 to 65535")
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):  # a few rows in double precision at a time
        scaled = values[start : start + _ROWS] * np.float64(255 / top)
        levels[start : start + _ROWS] = np.clip(np.round(scaled), 0, 255)
    return Image.fromarray(levels)


def float_range(high: float) -> int | None:
    """The upper end of the range that floats up to `high` are taken to be in, with half a level to spare."""
    return next((top for top in _RANGES if high <= top + top / 510), None)


def _with_profile(image: Image.Image) -> Image.Image:
    """Inks in the colors that their profile gives them; as without one where Pillow can't read it."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        shown = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return image
    return image if shown is None else shown
