"""An encoded image -> an upright 8-bit Pillow image, the one rule of training and prediction; runs without hfft."""

import codecs
import io
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

from hfft.data.images.tiff import check_tiff, describe_tiff, holds_signed_bytes, is_white_zero

MAX_PIXELS = 178_956_970  # where Pillow speaks of a decompression bomb
MAX_ASPECT = 100  # long side by short side: beyond it, a processor that resizes the short side fills the memory
_RANGES = (1, 255, 65535)
_ROWS = 256
# Pillow knows more: some start another program (EPS), some are decoded in Python, where a small file takes minutes
# (QOI, SGI), and some only look like images (HDF5, MPEG).
_READ = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000"),
    *("PPM", "TGA", "ICO", "PCX", "DDS", "PSD"),
)
_SAVE_AS = "save it as PNG or JPEG"
# Content that Pillow doesn't open: where its mark lies, the mark in any case of letters, and what to say.
_OTHERS = (
    (128, b"DICM", "is a DICOM file, which is not read: save its picture as PNG, or as TIFF of 16 bits"),
    (0, b"\xff\x0a", f"is JPEG XL, which is not read: {_SAVE_AS}"),
    (0, b"\0\0\0\x0cJXL ", f"is JPEG XL, which is not read: {_SAVE_AS}"),
    (4, b"ftypcrx ", f"is a camera's raw file, which is not read: {_SAVE_AS}"),
    (4, b"ftyp", "is a video, or a damaged AVIF or HEIC"),
    (0, b"\xff\xd8\xff", "is a JPEG with a damaged header, or not of 8 bits: save it as PNG"),
    (0, b"\x89PNG", "is a PNG with a damaged header"),
    (0, b"GIF8", "is a GIF with a damaged header"),
    (0, b"MM\0+", f"is a big-endian BigTIFF, which is not read: {_SAVE_AS}"),
    (0, b"\x93NUMPY", f"is an array of numpy, which is not read: {_SAVE_AS}"),
    (0, b"\x89HDF", f"is an HDF5 file, which is not read: {_SAVE_AS}"),
    (0, b"SIMPLE  =", f"is a FITS file, which is not read: {_SAVE_AS}"),
    (0, b"%PDF", f"is a PDF, which is not read: {_SAVE_AS}"),
    (0, b"%!PS", f"is PostScript, which is not read: {_SAVE_AS}"),
    (0, b"PK\3\4", "is a ZIP archive and no image: unpack it"),
    (0, b"version https://git-lfs", "is a pointer of Git LFS and no image: `git lfs pull` fetches it"),
    (0, b"<?xml", f"is XML (SVG?), which is not read: {_SAVE_AS}"),
    (0, b"<svg", f"is SVG, which is not read: {_SAVE_AS}"),
    (0, b"<!DOCTYPE html", "is a web page and no image (a download that failed?)"),
    (0, b"<html", "is a web page and no image (a download that failed?)"),
    (0, b"{", "is JSON and no image (a download that failed?)"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What Pillow remarks on odd files; what matters of it is an error here, or a finding of the audit.
warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here; HEIF is one of them where pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    Image.init()
    return tuple(name for name in _READ if name in Image.OPEN)


def open_picture(file: str | os.PathLike[str], background: Sequence[int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image; transparent pixels are laid over a background, if there is one.

    Raises:
        ValueError: If it can't be read; the message holds the reason, the caller knows the name.
    """
    try:
        with open(file, "rb") as stream:
            encoded = stream.read()
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or type(error).__name__}") from error
    return on_background(read_picture(open_header(encoded), encoded), background).convert("RGB")


def open_header(encoded: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not.

    Raises:
        ValueError: If it is none, or too large, or of a kind that would come out wrong.
    """
    if not encoded:
        raise ValueError("the file is empty")
    with pillow_errors():
        try:
            image = Image.open(io.BytesIO(encoded), formats=formats())
        except UnidentifiedImageError as error:
            raise ValueError(_what_else(encoded)) from error
        _check(image)
        return image


def read_picture(image: Image.Image, encoded: bytes | None = None) -> Image.Image:
    """An image that is open, upright: mode L, RGB, or RGBA where a pixel is transparent.

    Args:
        image: With or without its pixels.
        encoded: Its content, if it is at hand; damage that Pillow does not speak of is found there.

    Raises:
        ValueError: If it can't be decoded, or not to the pixels that it shows.
    """
    with pillow_errors():
        _check(image)
        if encoded is not None and image.format in ("JPEG", "MPO"):
            _check_jpeg(encoded, image.mode)
        if encoded is not None and image.format == "PNG":
            _check_png(encoded)
        _mend_transparency(image)
        upright = _upright(image)
        if _is_transparent(upright):
            return _in_mode(upright, "RGBA")
        return _in_mode(upright, "L" if upright.mode in ("1", "L") or is_deep(upright) else "RGB")


def _check(image: Image.Image) -> None:
    check_size(*image.size)
    check_tiff(image)


def check_size(width: int, height: int) -> None:
    """Refuse images that would fill the memory.

    Raises:
        ValueError: If there are too many pixels, or one side is too much longer than the other.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width} x {height} pixels; allowed: {MAX_PIXELS:,} (a decompression bomb?)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"has {width} x {height} pixels; allowed: one side at most {MAX_ASPECT} times the other")


def is_deep(image: Image.Image) -> bool:
    """Whether a channel has more than 8 bits, as Pillow's modes I, I;16 (any byte order) and F have."""
    return image.mode == "F" or image.mode.startswith("I")


def has_profile(image: Image.Image) -> bool:
    """Whether these are inks with a profile that says how they look."""
    return image.mode == "CMYK" and bool(image.info.get("icc_profile"))


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or EXIF can't be read."""
    with suppress(*_PILLOW_ERRORS, TypeError, KeyError, OverflowError):
        found = image.getexif().get(ExifTag.Orientation, 1)
        return found if isinstance(found, int) else 1
    return 1


def on_background(image: Image.Image, background: Sequence[int] | None) -> Image.Image:
    """An image without transparency: laid over a color, or, when None, with the colors that the file holds below it.

    The latter is what transformers' pipelines do.
    """
    if image.mode != "RGBA":
        return image
    if background is None:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background[:3], 255)), image).convert("RGB")


_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError, MemoryError)


@contextmanager
def pillow_errors() -> Iterator[None]:
    """What Pillow raises for bytes that are no image, as a ValueError of one line."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more pixels than the {MAX_PIXELS:,} allowed (a decompression bomb?)") from error
    except (*_PILLOW_ERRORS, TypeError, KeyError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
        # Plugins that are written in Python meet damaged headers in any of these ways.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(reason if isinstance(error, _PILLOW_ERRORS) else f"damaged: {reason}") from error


def _what_else(encoded: bytes) -> str:
    """What content is that Pillow doesn't open, and what to do."""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIC and "HEIF" not in formats():
        return "is HEIC, which is read with the package pillow-heif: pip install pillow-heif"
    if encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        told = describe_tiff(encoded)
        if told is not None:
            return told
    start = encoded[:256].removeprefix(codecs.BOM_UTF8).lstrip()
    for place, mark, what in _OTHERS:
        if (encoded if place else start)[place : place + len(mark)].lower() == mark.lower():
            return what
    return "not an image in any format that hfft reads"


def _check_jpeg(encoded: bytes, mode: str) -> None:
    """Raise where pixels had to be made up, if simplejpeg is installed, whose word counts.

    Pillow hides that: libjpeg fills what it can't decode with gray, and goes on.
    """
    try:
        import simplejpeg
    except ImportError:
        return
    try:
        colors = {"L": "GRAY", "RGB": "RGB"}.get(mode, "CMYK")
        simplejpeg.decode_jpeg(encoded, colors, min_height=SMALL, min_width=SMALL)
    except ValueError as error:
        refuse_lost(error)


SMALL = 64  # pixels that a reduced size has at least
_LOST = "the JPEG is damaged and part of its picture lost"
_TRUNCATED = "image file is truncated"


def refuse_lost(error: ValueError) -> None:
    """Raise where a message of libjpeg (jerror.h) says that pixels are missing or wrong."""
    message = str(error)
    if message.startswith("Premature end of JPEG file"):
        raise ValueError(_TRUNCATED) from error
    if any(words in message for words in ("premature end of data", "bad Huffman", "bad arithmetic", "found marker")):
        raise ValueError(f"{_LOST}: {message.removeprefix('Corrupt JPEG data: ')}") from error


def _check_png(encoded: bytes) -> None:
    """Raise where a part that pixels depend on has another checksum than it says, which Pillow does not look at."""
    place = 8
    while place + 12 <= len(encoded):
        size = int.from_bytes(encoded[place : place + 4], "big")
        kind, end = encoded[place + 4 : place + 8], place + 8 + size
        if kind in (b"IHDR", b"PLTE", b"IDAT") and end + 4 <= len(encoded):
            told = int.from_bytes(encoded[end : end + 4], "big")
            if zlib.crc32(memoryview(encoded)[place + 4 : end]) != told:
                raise ValueError(f"the PNG is damaged: wrong checksum of {kind.decode()}")
        place = end + 4


def _mend_transparency(image: Image.Image) -> None:
    """Scale the transparent color of a PNG as Pillow scales its pixels: from 2 or 4 bits, or to 8 of 16."""
    color, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format != "PNG" or color is None or not tiles:  # no tiles: loaded before
        return
    raw = tiles[0].args
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in color)


def _upright(image: Image.Image) -> Image.Image:
    """The loaded image, turned if it has to be; Pillow's own function copies the others too."""
    image.load()
    image = from_black(image)
    return image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)


def from_black(image: Image.Image) -> Image.Image:
    """A loaded image whose levels count from black; as it is where they do already.

    Raises:
        ValueError: If it holds negative bytes, or floats that are in no known range.
    """
    if holds_signed_bytes(image) and cast("tuple[int, int]", image.getextrema())[1] > 127:
        raise ValueError("holds negative values; allowed: 0 to 127 in a TIFF of 8-bit integers with a sign")
    if not is_white_zero(image) or not is_deep(image):
        return image
    values = np.asarray(image)
    top = _top(image, values)
    return Image.fromarray((top - values).astype(np.float32 if image.mode == "F" else np.int32))


def _is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a loaded image shows what is behind it."""
    if not image.has_transparency_data:
        return False
    if is_deep(image):
        return bool(_is_color(image).any())
    if image.mode not in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
    lowest, _ = cast("tuple[int, int]", image.getchannel("A").getextrema())
    return lowest < 255


def _is_color(image: Image.Image) -> np.ndarray:
    """Where a deep image has the color that its file calls transparent, (H, W)."""
    return np.asarray(image) == image.info["transparency"]


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An 8-bit image in mode L, RGB or RGBA."""
    if is_deep(image):
        levels = _eight_bits(image)
        if mode == "RGBA":
            levels.putalpha(Image.fromarray(~_is_color(image)).convert("L"))
        image = levels
    if has_profile(image):
        image = _with_profile(image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Mode L from more bits: 16-bit integers divided by 257, floats from the smallest of the ranges that holds them.

    Raises:
        ValueError: If a value is in none of them, so that nothing is clipped.
    """
    values = np.asarray(image)  # (H, W) of uint16, int32 or float32
    top = _top(image, values)
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):  # a few rows in double precision at a time
        scaled = values[start : start + _ROWS] * np.float64(255 / top)
        levels[start : start + _ROWS] = np.clip(np.round(scaled), 0, 255)
    return Image.fromarray(levels)


def _top(image: Image.Image, values: np.ndarray) -> int:
    """The upper end of the range that deep values are in."""
    if not np.isfinite([values.min(), values.max()]).all():  # NaN where any value is
        raise ValueError("holds values that are not finite numbers")
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    top = float_range(high) if image.mode == "F" else 65535
    if top is None or low < -top / 510 or high > top + top / 510:
        raise ValueError(f"holds values from {low:g} to {high:g}; allowed: 0 to 1, 0 to 255, or 0 to 65535")
    return top


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
