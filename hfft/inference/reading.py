"""Images in any form -> pixels as the evaluation has them, decoded by threads a little ahead of who takes them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hfft.data.images.decoding import Decoded, data_errors, decode_bytes, decode_open, read_file
from hfft.data.images.formats import check_size
from hfft.errors import DataError, first_line
from hfft.inference.urls import RemoteImage
from hfft.system.machine import cpus_per_process
from hfft.system.text import printable_path

ImageLike = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor | RemoteImage
)
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Ready:
    """An image that the network can take.

    Attributes:
        file: Its path or URL, or its number among the images.
        pixels: (C, H, W).
    """

    file: str
    pixels: torch.Tensor


@dataclass(frozen=True)
class Skipped:
    """An image that can't be read.

    Attributes:
        file: Its path or URL, or its number among the images.
        reason: Why.
    """

    file: str
    reason: str


def is_image(value: object) -> bool:
    """Whether a value is one image, and not several."""
    single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor, RemoteImage)
    return isinstance(value, single)


def read_ahead(
    images: Iterable[ImageLike], prepare: Callable[[Decoded], torch.Tensor], *, ahead: int
) -> Iterator[Ready | Skipped]:
    """Decode and prepare images in threads, and hand them over in their order.

    Args:
        images: Taken one at a time, never more than `ahead` + 1 of them before the first is handed over.
        prepare: Decoded image -> (C, H, W).
        ahead: Images that are being prepared, or wait, while the last one is used.
    """
    pool = ThreadPoolExecutor(max(cpus_per_process(), 2), "hfft-images")
    waiting: deque[Future[Ready | Skipped]] = deque()
    try:
        for number, image in enumerate(images):
            waiting.append(_begin(pool, image, number, prepare))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    pool: ThreadPoolExecutor, image: ImageLike, number: int, prepare: Callable[[Decoded], torch.Tensor]
) -> "Future[Ready | Skipped]":
    file = _name(image, number)
    try:
        return pool.submit(_finish, file, _take(image), prepare)
    except DataError as error:
        failed: Future[Ready | Skipped] = Future()
        failed.set_result(Skipped(file, str(error)))
        return failed


def _finish(file: str, content: Callable[[], Decoded], prepare: Callable[[Decoded], torch.Tensor]) -> Ready | Skipped:
    try:
        decoded = content()
    except DataError as error:
        return Skipped(file, str(error))
    try:
        return Ready(file, prepare(decoded))
    except (ValueError, RuntimeError) as error:
        return Skipped(file, f"the image processor can't take it: {first_line(error)}")


def _name(image: ImageLike, number: int) -> str:
    if isinstance(image, RemoteImage):
        return image.name
    if isinstance(image, str | os.PathLike):
        return printable_path(image)
    return str(number)


def _take(image: ImageLike) -> Callable[[], Decoded]:
    """How to decode an image later; what its owner may close or change meanwhile is decoded or copied now."""
    if isinstance(image, str | os.PathLike):
        return partial(_decode_file, Path(image))
    if isinstance(image, RemoteImage):
        return lambda: decode_bytes(image.fetch())
    if isinstance(image, bytes | bytearray | memoryview):
        return partial(decode_bytes, bytes(image))
    if isinstance(image, Image.Image):
        upright = decode_open(image)
        own = upright.copy() if upright is image else upright
        return lambda: own
    if isinstance(image, np.ndarray | torch.Tensor):
        pixels = decode_array(image)
        return lambda: pixels
    raise DataError(
        f"found {type(image).__name__}; allowed: a path, encoded bytes, a Pillow image, or a numpy array or torch "
        "tensor (H, W, C)"
    )


def _decode_file(path: Path) -> Decoded:
    if path.is_dir():
        raise DataError("is a folder; give the image files in it")
    return decode_bytes(read_file(path))


def decode_array(image: np.ndarray | torch.Tensor) -> Decoded:
    """An upright 8-bit image, a copy, from an array of pixels: (1 or 3, H, W) uint8, or mode RGBA if transparent.

    The array is (H, W), or (H, W, C) with gray, red-green-blue, or these with transparency. uint8 is taken as it is,
    uint16 is divided by 257 as in 16-bit files, and floating point goes from 0 to 1. All else could mean several
    things and is refused: channels first, other integers, floating point beyond 0 to 1.

    Args:
        image: The pixels.

    Raises:
        DataError: If shape, type or values are others.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.double() if image.is_floating_point() else image).numpy()
    if image.ndim == 2:
        image = image[..., np.newaxis]  # (H, W, 1)
    if image.ndim != 3 or image.shape[2] not in _CHANNELS:
        channels_first = image.ndim == 3 and image.shape[0] in _CHANNELS
        hint = "; move the channels to the end: permute(1, 2, 0)" if channels_first else ""
        raise DataError(f"found an array of shape {image.shape}; allowed: (H, W), or (H, W, C) with C 1, 3 or 4{hint}")
    if image.size == 0:
        raise DataError(f"found an array of shape {image.shape}, which holds no pixels")
    with data_errors():
        check_size(image.shape[1], image.shape[0])
    pixels = _eight_bits(image)  # (H, W, C)
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
        return Image.fromarray(pixels)
    pixels = pixels[..., :3]
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (1 or 3, H, W)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values.copy()
    if values.dtype == np.uint16:
        return np.round(values / 257).astype(np.uint8)
    allowed = "allowed: uint8 from 0 to 255, uint16 from 0 to 65535, or floating point from 0 to 1"
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"found pixels of type {values.dtype}; {allowed}")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN too
        raise DataError(f"found floating-point pixels from {low:g} to {high:g}; {allowed}")
    return np.round(values.astype(np.float64) * 255).astype(np.uint8)
