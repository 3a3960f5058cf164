"""Pictures of a run's images, for its page: found again, and made small."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image

from hfft.data.audit.filtering import fingerprint_of
from hfft.data.images.decoding import decode_row
from hfft.data.sources.reading import ImageData, images_of_run
from hfft.errors import DataError, HfftError
from hfft.runs.facts import RunFacts
from hfft.runs.record import RunRecord

_SIDE = 224  # pixels at most


@dataclass(frozen=True)
class Shown:
    """An image that was taken for another class than its own.

    Attributes:
        file: Its name, as in predictions.parquet.
        label: Its class.
        prediction: The class it was taken for.
        label_probability: Of its class.
        probability: Of the class it was taken for.
        picture: File in the folder; None where there is none.
        overlay: File of what the network gets to see, with the places that spoke for its answer; None where there is
            none.
        missing: Why there is no picture; empty where there is one.
    """

    file: str
    label: str
    prediction: str
    label_probability: float
    probability: float
    picture: str | None = None
    overlay: str | None = None
    missing: str = ""


def rows_of(
    facts: RunFacts, split: str, shown: Sequence[Shown], images: ImageData | None
) -> list[dict[str, Any] | None]:
    """The row of each image of a finished run, as `rows_in`; the images are looked for when None.

    Raises:
        DataError: If the images aren't those of the run any more; names no place of this disk, as the page shows it.
    """
    return rows_in(images or _same_images(facts, split), split, shown)


def rows_in(images: ImageData, split: str, shown: Sequence[Shown]) -> list[dict[str, Any] | None]:
    """The row of each image; None for one that isn't there any more, or has another label."""
    rows: Dataset | None = images.splits.get(split)
    places = {} if rows is None else {file: place for place, file in enumerate(rows["file"][:])}
    found: list[dict[str, Any] | None] = []
    for one in shown:
        row = rows[places[one.file]] if rows is not None and one.file in places else None
        found.append(row if row is not None and images.labels[row["label"]] == one.label else None)
    return found


def _same_images(facts: RunFacts, split: str) -> ImageData:
    """What the recipe finds, if the split still holds what it held; DataError if not."""
    if facts.data.kind == "memory":
        raise DataError("the images were in memory when the run was made")
    PartialState(cpu=not torch.accelerator.is_available())  # which the log of the next lines needs
    try:
        images = images_of_run(facts.folder)
        now = fingerprint_of(images.splits[split]) if split in images.splits else None
    except (HfftError, OSError) as error:
        raise DataError("the images can't be read where the recipe says") from error
    if now != RunRecord(facts.folder).data["splits"][split]["fingerprint"]:
        raise DataError(f"the {split} images aren't those of the run any more")
    return images


def pictures_of(rows: Sequence[dict[str, Any] | None]) -> tuple[dict[int, Image.Image], dict[int, str]]:
    """Small pictures by place among the rows; and for the other places why there is none."""
    pictures: dict[int, Image.Image] = {}
    missing: dict[int, str] = {}
    for place, row in enumerate(rows):
        if row is None:
            missing[place] = "it is not among the images any more"
            continue
        try:
            pictures[place] = small(as_image(decode_row(row)))
        except (DataError, OSError) as error:
            missing[place] = f"it can't be read: {error}"
    return pictures, missing


def as_image(decoded: Any) -> Image.Image:
    """An RGB image of an image, or of pixels (C, H, W)."""
    if isinstance(decoded, Image.Image):
        return decoded.convert("RGB")
    return Image.fromarray(decoded.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def small(picture: Image.Image) -> Image.Image:
    """The picture itself, made no larger than the page shows it."""
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return picture
