"""What there is to know of one encoded image: whether it can be decoded, its size, its traits, a thumbnail."""

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfft.data.images.decoding import Decoded, decode_small, on_background, open_image
from hfft.data.images.modes import from_black, has_profile, is_deep
from hfft.errors import DataError

SIDE = 32  # of a thumbnail, pixels
# Bits of `traits`.
DEEP, FLOATS, TRANSPARENT, FRAMES, INKS, BLANK, REMARKED = (1 << bit for bit in range(7))
RECORD = np.dtype(
    [
        ("digest", "S32"),  # of the file's content, in hexadecimal digits
        ("format", "S8"),  # Pillow's name
        ("width", np.uint32),
        ("height", np.uint32),
        ("traits", np.uint16),
        ("peak", np.float32),  # the largest value of a deep image
        ("seen", np.uint8),  # how closely it was looked at: an index into LEVELS
        ("broken", np.uint8),
    ]
)
LEVELS = ("off", "quick", "full")
_LARGE = 16_000_000  # pixels; such images are decoded one at a time
_ONE_LARGE = threading.Lock()


@dataclass(frozen=True)
class Examined:
    """One image.

    Attributes:
        record: Values of `RECORD`.
        problem: Why it can't be decoded, or None.
        remark: What its decoder remarked, or None.
        thumbnail: (32, 32) uint8, gray; None where nothing was decoded.
    """

    record: tuple[Any, ...]
    problem: str | None
    remark: str | None = None
    thumbnail: np.ndarray | None = None

    @property
    def digest(self) -> bytes:
        """Hash of the file's content."""
        return self.record[0]


def digest_of(content: bytes) -> bytes:
    """Hash of a file's content, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def examine_content(content: bytes, level: str, background: tuple[int, int, int] | None = None) -> Examined:
    """Look at an encoded image as closely as was asked for; what can't be decoded is a problem and no exception.

    Args:
        content: The file's bytes.
        level: `full` decodes it, `quick` reads its header, `off` its bytes alone.
        background: Color that shows through transparent pixels.
    """
    digest, seen = digest_of(content), LEVELS.index(level)
    if level == "off":
        return Examined((digest, b"", 0, 0, 0, 0.0, seen, 0), None)
    try:
        image = open_image(content)
        width, height = image.size
        if level == "quick":
            return Examined((digest, _format(image), width, height, _traits(image), 0.0, seen, 0), None)
        if width * height > _LARGE:
            with _ONE_LARGE:
                return _decoded(content, digest, background)
        return _decoded(content, digest, background)
    except DataError as error:
        return Examined((digest, b"", 0, 0, 0, 0.0, seen, 1), str(error))


def _decoded(content: bytes, digest: bytes, background: tuple[int, int, int] | None) -> Examined:
    image, picture, remark = decode_small(content)
    traits, peak = _traits(image), 0.0
    if is_deep(image):
        peak = float(np.asarray(from_black(image)).max())
        traits |= DEEP | (FLOATS if image.mode == "F" else 0)
    if isinstance(picture, Image.Image) and picture.mode == "RGBA":
        traits |= TRANSPARENT
    if remark is not None:
        traits |= REMARKED
    gray = _gray(on_background(picture, background))
    low, high = gray.getextrema()
    if high - low <= 2:  # pyright: ignore[reportOperatorIssue]
        traits |= BLANK
    thumbnail = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX))
    width, height = image.size
    return Examined(
        (digest, _format(image), width, height, traits, peak, LEVELS.index("full"), 0), None, remark, thumbnail
    )


def _format(image: Image.Image) -> bytes:
    return (image.format or "").encode()


def _traits(image: Image.Image) -> int:
    frames = False
    if image.format != "MPO":  # a photo with a preview of itself
        with suppress(OSError, ValueError, EOFError, SyntaxError):  # damaged behind the first frame
            frames = getattr(image, "is_animated", False)
    return (FRAMES if frames else 0) | (INKS if has_profile(image) else 0)


def _gray(picture: Decoded) -> Image.Image:
    if isinstance(picture, torch.Tensor):  # (1 or 3, H, W)
        pixels = picture[0] if picture.shape[0] == 1 else picture.permute(1, 2, 0)
        picture = Image.fromarray(pixels.numpy())
    return picture.convert("L")
