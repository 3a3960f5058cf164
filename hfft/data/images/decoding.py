"""A file, a row or an open image -> pixels for training, evaluation, audit and prediction, by the rule of `modes`."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from stat import S_ISREG
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from hfft.data.images.formats import SMALL, open_header, pillow_errors, refuse_lost
from hfft.data.images.modes import on_background, orientation_of, read_picture
from hfft.errors import DataError
from hfft.system.text import path_text, printable, printable_path

# Changed with the pixels that any file gives: activation caches and audits of another number are not used.
RULE = 3

# Upright, 8 bits: a Pillow image in mode L, RGB or RGBA, or (1 or 3, H, W) uint8.
Decoded = Image.Image | torch.Tensor

_PART = re.compile(rb"(.*)\?(\d+)\+(\d+)", re.DOTALL)
# Bytes of names that are no UTF-8, which Python keeps as halves of a pair and Arrow refuses, as private characters.
_STORED = {0xDC80 + byte: 0x10FF80 + byte for byte in range(128)}
_OPENED = {stored: byte for byte, stored in _STORED.items()}


def stored_path(text: str) -> str:
    """A path, as `path_text` has it, as text that a table takes and `read_content` opens."""
    return text.translate(_STORED)


def opened_path(stored: str) -> bytes:
    """The path as the system has it, which holds private characters itself if there is such a file."""
    plain, opened = stored.encode(), stored.translate(_OPENED).encode("utf-8", "surrogateescape")
    return plain if plain == opened or os.path.lexists(plain) else opened


def shown_path(stored: str) -> str:
    """A stored path as any console takes it."""
    return printable(stored.translate(_OPENED))


def part_of(file: str | os.PathLike[str], offset: int, size: int) -> str:
    """The name of a part of a file, which `read_content` reads."""
    return f"{stored_path(path_text(file))}?{offset}+{size}"


@contextmanager
def data_errors() -> Iterator[None]:
    """What `formats`, `modes` and the decoders raise, as a DataError of one line; the caller knows the file."""
    try:
        with pillow_errors():
            yield
    except ValueError as error:
        raise DataError(str(error)) from error


@contextmanager
def _file_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except (OSError, ValueError) as error:  # a name that holds a zero byte is a ValueError
        raise DataError(f"can't be read: {getattr(error, 'strerror', None) or error}") from error


@_file_errors()
def read_file(path: str | bytes | os.PathLike[str]) -> bytes:
    """The content of a regular file; one of another kind, such as a named pipe, could keep its reader waiting."""
    if not S_ISREG(os.stat(path).st_mode):
        raise OSError("is no regular file")
    with open(path, "rb") as stream:
        return stream.read()


@_file_errors()
def read_content(image: dict[str, Any] | None) -> bytes:
    """Encoded bytes of a row's image: its `bytes`, or the file, or part of one (`part_of`), at its `path`.

    Raises:
        DataError: If there is none, or its file can't be read.
    """
    if image is None:
        raise DataError("the row holds no image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = opened_path(image["path"])
    part = _PART.fullmatch(path)
    if part is None or os.path.lexists(path):
        return read_file(path)
    with open(part[1], "rb") as stream:
        stream.seek(int(part[2]))
        content = stream.read(int(part[3]))
    if len(content) < int(part[3]):
        raise OSError(f"{printable_path(part[1])} ends in the middle of the image")
    return content


def decode(
    source: bytes | str | os.PathLike[str] | Image.Image, background: tuple[int, int, int] | None = None
) -> Image.Image:
    """An upright 8-bit RGB image from a file's content, a path or an open image; docs/data.md states the rule.

    `background` is the color that shows through transparent pixels; what the file holds below them when None.

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


@data_errors()
def decode_open(image: Image.Image) -> Image.Image:
    """The same for an image that is open already: mode L, RGB, or RGBA where a pixel is transparent."""
    return read_picture(image)


def decode_row(row: dict[str, Any]) -> Decoded:
    """The image of a data set's row; gray ones in one channel. A DataError names the file."""
    try:
        return decode_bytes(read_content(row["image"]))
    except DataError as error:
        raise DataError(f"{row['file']}: {error}") from error


@data_errors()
def open_image(encoded: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not."""
    return open_header(encoded)


@data_errors()
def decode_bytes(encoded: bytes) -> Decoded:
    """Decode with simplejpeg, nearly twice as fast, what it decodes as Pillow does; all else with Pillow."""
    image = open_header(encoded)
    colors = {"L": "GRAY", "RGB": "RGB"}.get(image.mode)
    if image.format in ("JPEG", "MPO") and colors is not None and _simplejpeg_equals_pillow():
        try:
            return _turned(_decode_jpeg(encoded, colors), orientation_of(image))
        except ValueError as error:  # without lost pixels, it is something that only Pillow decodes
            refuse_lost(error)
    return read_picture(image, encoded)


@data_errors()
def decode_small(encoded: bytes) -> tuple[Image.Image, Decoded, str | None]:
    """The header, the picture (a JPEG's at reduced size), and what its decoder remarked that may cost no pixel.

    It raises exactly where `decode_bytes` does.
    """
    image, remark = open_header(encoded), None
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _simplejpeg_equals_pillow():
        try:
            return image, _turned(_decode_jpeg(encoded, "GRAY", SMALL), orientation_of(image)), None
        except ValueError as error:
            refuse_lost(error)
            remark = str(error) if str(error).startswith("Corrupt") else None  # others say what simplejpeg can't do
    return image, decode_bytes(encoded), remark


def _decode_jpeg(encoded: bytes, colors: str, side: int = 0) -> torch.Tensor:
    """(1 or 3, H, W) uint8, a view on (H, W, 1 or 3); each side reduced, but not below `side` if that is above 0."""
    return torch.from_numpy(simplejpeg.decode_jpeg(encoded, colors, min_height=side, min_width=side)).permute(2, 0, 1)


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
