"""Encoded images -> pixels for training, evaluation, audit and prediction, by the rule of `pictures`; JPEGs faster."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from hfft.data.images import content, modes
from hfft.data.images.modes import SMALL, open_header, orientation_of, pillow_errors, read_picture, refuse_lost
from hfft.errors import DataError

# Changed with the pixels that any file gives: recordings and cached audits of another number are not used.
RULE = 3

# Upright, 8 bits: a Pillow image in mode L, RGB or RGBA, or (1 or 3, H, W) uint8.
Decoded = Image.Image | torch.Tensor


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
    with _data_errors():
        return read_picture(image)


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


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        with pillow_errors():
            yield
    except ValueError as error:
        raise DataError(str(error)) from error


def open_image(encoded: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not.

    Raises:
        DataError: If it is none, or too large; the message holds the reason, the caller knows the name.
    """
    with _data_errors():
        return open_header(encoded)


def check_size(width: int, height: int) -> None:
    """Refuse images that would fill the memory.

    Raises:
        DataError: If there are too many pixels, or one side is too much longer than the other.
    """
    with _data_errors():
        modes.check_size(width, height)


def decode_bytes(encoded: bytes) -> Decoded:
    """Decode with simplejpeg, nearly twice as fast, what it decodes as Pillow does; all else with Pillow.

    Raises:
        DataError: If it can't be decoded; the message holds the reason, the caller knows the name.
    """
    image = open_image(encoded)
    with _data_errors():
        if image.format in ("JPEG", "MPO"):
            pixels = _decode_jpeg_strictly(encoded, image.mode)
            if pixels is not None:
                return _turned(pixels, orientation_of(image))
        return read_picture(image, encoded)


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
            pixels = simplejpeg.decode_jpeg(encoded, "GRAY", min_height=SMALL, min_width=SMALL)  # (H, W, 1)
        except ValueError as error:
            with _data_errors():
                refuse_lost(error)
            remark = str(error) if str(error).startswith("Corrupt") else None  # others say what simplejpeg can't do
            return image, decode_bytes(encoded), remark
        return image, _turned(torch.from_numpy(pixels).permute(2, 0, 1), orientation_of(image)), None
    return image, decode_bytes(encoded), None


def on_background(image: Decoded, background: tuple[int, int, int] | None) -> Decoded:
    """An image without transparency, as `modes.on_background`; a tensor has none."""
    return modes.on_background(image, background) if isinstance(image, Image.Image) else image


def _decode_jpeg_strictly(encoded: bytes, mode: str) -> torch.Tensor | None:
    """(1 or 3, H, W), or None where Pillow has to; raises where the decoder had to make up pixels."""
    colors = {"L": "GRAY", "RGB": "RGB"}.get(mode)
    if colors is None or not _simplejpeg_equals_pillow():
        return None
    try:
        return _decode_jpeg(encoded, colors)
    except ValueError as error:
        refuse_lost(error)
    return None


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
