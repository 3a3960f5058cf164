"""Images in any form -> pixels as the evaluation has them, decoded in threads a little ahead of the model."""

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
from hfft.inference.images import RemoteImage
from hfft.system.machine import cpus_per_process
from hfft.system.text import printable_path

ImageLike = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor | RemoteImage
)
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Ready:
    """An image that the network can take; `file` is its path or URL, or its number among the images."""

    file: str
    pixels: torch.Tensor  # (C, H, W)


@dataclass(frozen=True)
class Skipped:
    """An image that can't be read, by its path or URL, or its number among the images; and why."""

    file: str
    reason: str


def is_one_image(value: object) -> bool:
    """Whether a value is one image, and not several."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor, RemoteImage)
    return isinstance(value, kinds)


def read_ahead(
    images: Iterable[ImageLike], transform: Callable[[Decoded], torch.Tensor], *, ahead: int
) -> Iterator[Ready | Skipped]:
    """Decode and transform images in threads, in their order; at most `ahead` results are computed or wait.

    Images are taken one at a time, at most `ahead` + 1 of them before the first result is yielded. `transform` makes
    (C, H, W) of a decoded image.
    """
    pool = ThreadPoolExecutor(max(cpus_per_process(), 2), "hfft-images")
    waiting: deque[Future[Ready | Skipped]] = deque()
    try:
        for number, image in enumerate(images):
            waiting.append(pool.submit(_read, _name(image, number), _decoder(image), transform))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(file: str, decode: Callable[[], Decoded], transform: Callable[[Decoded], torch.Tensor]) -> Ready | Skipped:
    try:
        decoded = decode()
    except DataError as error:
        return Skipped(file, str(error))
    try:
        return Ready(file, transform(decoded))
    except (ValueError, RuntimeError) as error:
        return Skipped(file, f"the image processor can't take it: {first_line(error)}")


def _name(image: ImageLike, number: int) -> str:
    if isinstance(image, RemoteImage):
        return image.name
    return printable_path(image) if isinstance(image, str | os.PathLike) else str(number)


def _decoder(image: ImageLike) -> Callable[[], Decoded]:
    """Decodes an image in a thread; one that its owner may close or change meanwhile is decoded or copied now."""
    if isinstance(image, str | os.PathLike):
        return partial(_decode_file, Path(image))
    if isinstance(image, RemoteImage):
        return lambda: decode_bytes(image.fetch())
    if isinstance(image, bytes | bytearray | memoryview):
        return partial(decode_bytes, bytes(image))
    done: Future[Decoded] = Future()
    try:
        done.set_result(_decode_now(image))
    except DataError as error:
        done.set_exception(error)
    return done.result


def _decode_file(path: Path) -> Decoded:
    if path.is_dir():
        raise DataError("is a folder; give the image files in it")
    return decode_bytes(read_file(path))


def _decode_now(image: Image.Image | np.ndarray | torch.Tensor) -> Decoded:
    if isinstance(image, Image.Image):
        upright = decode_open(image)
        return upright.copy() if upright is image else upright
    if isinstance(image, np.ndarray | torch.Tensor):
        return decode_array(image)
    raise DataError(
        f"found {type(image).__name__}; allowed: a path, encoded bytes, a Pillow image, or an array (H, W, C)"
    )


def decode_array(image: np.ndarray | torch.Tensor) -> Decoded:
    """An upright 8-bit image, a copy: (1 or 3, H, W) uint8, or a Pillow image in mode RGBA if a pixel is transparent.

    Takes (H, W), or (H, W, C) with 1, 3 or 4 channels: uint8 as it is, uint16 divided by 257 as in 16-bit files,
    floating point from 0 to 1.

    Raises:
        DataError: If the array could mean several things: channels first, other integers, floats beyond 0 to 1.
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
    return torch.from_numpy(pixels[..., :3]).permute(2, 0, 1)  # (1 or 3, H, W)


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
