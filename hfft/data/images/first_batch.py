"""A training batch as a picture: the first images as the network sees them, and their labels."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont

from hfft.data.images.batches import EpochOrder, Examples
from hfft.data.images.transforms import pixel_scale
from hfft.errors import first_line
from hfft.system.distributed import warn
from hfft.system.files import write_file

_MOST, _COLUMNS = 16, 4  # images
_SIDE, _LETTERS, _GAP = 144, 12, 8  # pixels

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def try_first_batch(
    file: Path,
    examples: Examples,
    collate: Collate,
    *,
    processor: Any,
    classes: Sequence[str],
    seed: int,
    chances: torch.Tensor | None,
) -> None:
    """Draw up to 16 images in the main process, if there is no such file; whatever goes wrong is a warning alone.

    They come in the order of `EpochOrder`, and are mixed with each other where training mixes images.
    """
    if not PartialState().is_main_process or file.exists():
        return
    try:
        order = EpochOrder(examples, seed=seed, multiple=1, chances=chances)
        batch = collate([examples[index] for index in islice(order, _MOST)])
        pixels = batch["pixel_values"]  # (B, 3, H, W)
        if pixels.is_floating_point():
            pixels = pixel_scale(processor).bytes(pixels)
        images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
        sheet = _draw(images, [_caption(label, classes) for label in batch["labels"].numpy()])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, lambda aside: sheet.save(aside, "PNG"))
    except Exception as error:  # a run isn't lost for a picture
        warn(f"{file} was not written: {type(error).__name__}: {first_line(error)}")


def _draw(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    columns, rows = min(len(images), _COLUMNS), -(-len(images) // _COLUMNS)
    width, height = _SIDE + _GAP, _SIDE + _LETTERS + 2 * _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LETTERS)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % _COLUMNS * width + _GAP, number // _COLUMNS * height + _GAP
        tile = _tile(image)
        sheet.paste(tile, (left + (_SIDE - tile.width) // 2, top + (_SIDE - tile.height) // 2))
        draw.text((left, top + _SIDE + _GAP // 2), _shortened(caption, font), "black", font)
    return sheet


def _tile(image: Image.Image) -> Image.Image:
    share = _SIDE / max(image.size)
    return image.resize((max(round(image.width * share), 1), max(round(image.height * share), 1)))


def _caption(label: np.ndarray, classes: Sequence[str]) -> str:
    """The name of a class, or of shares (K,) the three largest; the font has Latin letters alone."""

    def name(number: int) -> str:
        is_latin = classes[number].encode("latin-1", "ignore").decode("latin-1") == classes[number]
        return classes[number] if is_latin else f"class {number}"

    if label.ndim == 0:
        return name(int(label))
    there = [number for number in np.argsort(-label, kind="stable").tolist() if label[number] > 0]
    if np.isin(label, (0, 1)).all():
        return " + ".join(map(name, sorted(there))) or "no label"
    return ", ".join(f"{name(number)} {label[number]:.0%}" for number in there[:3])


def _shortened(text: str, font: Any) -> str:
    if font.getlength(text) <= _SIDE:
        return text
    while text and font.getlength(f"{text}...") > _SIDE:
        text = text[:-1]
    return f"{text}..."
