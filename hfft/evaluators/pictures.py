"""Pictures of a run's images for its page: found again, made small, and kept in its folder."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image

from hfft.data.audit.filtering import fingerprint_of
from hfft.data.images.augmentation import as_pillow
from hfft.data.images.decoding import decode_row
from hfft.data.sources.reading import ImageData, images_of_run
from hfft.errors import DataError, HfftError
from hfft.runs.facts import RunFacts
from hfft.runs.record import LABEL_HINTS, LABEL_ISSUES, LABEL_PICTURES, RunRecord
from hfft.system.files import read_json, write_folder, write_json

_SIDE = 224  # pixels at most
_ISSUES = 12  # with pictures

_LOG = logging.getLogger(__name__)  # the main process alone gets here


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image that was taken for another class than its own."""

    file: str  # as in predictions.parquet
    label: str
    prediction: str
    label_probability: float
    probability: float  # of the class it was taken for
    picture: str | None = None  # file in the folder
    overlay: str | None = None  # file of what the network gets to see, with the places that spoke for its answer
    missing: str = ""  # why there is no picture


@dataclasses.dataclass(frozen=True)
class PicturedIssues:
    """Training images whose label looks wrong; `prediction` of those shown is the class that they may be of."""

    images: int  # that were looked at
    issues: int
    shown: tuple[Shown, ...]
    left_out: str = ""  # why none were looked for


def read_label_issues(folder: Path) -> PicturedIssues | None:
    """The label issues of a run folder, with the pictures that are kept of them; None where none were looked for."""
    file = next((folder / name for name in (LABEL_ISSUES, LABEL_HINTS) if (folder / name).is_file()), None)
    if file is None:
        return None
    content: dict[str, Any] = read_json(file)
    if content["left_out"] is not None:
        return PicturedIssues(0, 0, (), content["left_out"])
    chosen = tuple(
        Shown(row["file"], row["label"], row["believed"], row["label_probability"], row["believed_probability"])
        for row in content["hints"][:_ISSUES]
    )
    try:
        kept = tuple(Shown(**one) for one in read_json(folder / LABEL_PICTURES / "shown.json"))
    except (OSError, ValueError, TypeError):
        kept = ()
    if tuple(dataclasses.replace(one, picture=None, missing="") for one in kept) != chosen:
        kept = tuple(dataclasses.replace(one, missing="it was not kept") for one in chosen)
    return PicturedIssues(content["images"], len(content["hints"]), kept)


def keep_label_pictures(facts: RunFacts, images: ImageData | None = None) -> None:
    """Write the pictures of a finished run's label issues, unless all of them are there; images as for `rows_of`."""
    issues = read_label_issues(facts.folder)
    if issues is not None and any(one.missing for one in issues.shown):
        folder = facts.folder / LABEL_PICTURES
        found = find_pictures(folder, issues.shown, lambda: rows_of(facts, "train", issues.shown, images))
        write_pictures(folder, found.files, "shown.json", [dataclasses.asdict(one) for one in found.shown])


@dataclasses.dataclass(frozen=True)
class FoundPictures:
    """What is shown, with the names of its pictures or the reasons why there are none; files and rows by place."""

    shown: list[Shown]
    files: dict[str, Image.Image]
    rows: dict[int, dict[str, Any]]


def find_pictures(
    folder: Path, shown: Sequence[Shown], find_rows: Callable[[], Sequence[dict[str, Any] | None]]
) -> FoundPictures:
    """Small pictures of images, for a folder that the log names where the rows can't be found."""
    found = FoundPictures([], {}, {})
    try:
        rows = find_rows() if shown else []
    except DataError as error:
        _LOG.warning(f"{folder}: no pictures: {error.__cause__ or error}")
        return dataclasses.replace(found, shown=[dataclasses.replace(one, missing=str(error)) for one in shown])
    for place, (one, row) in enumerate(zip(shown, rows, strict=True)):
        name, missing = f"{place}.jpg", "it is not among the images any more"
        if row is not None:
            try:
                found.files[name], found.rows[place] = small(as_pillow(decode_row(row))), row
            except (DataError, OSError) as error:
                missing = f"it can't be read: {error}"
        changes = {"picture": name, "missing": ""} if name in found.files else {"picture": None, "missing": missing}
        found.shown.append(dataclasses.replace(one, **changes))
    return found


def write_pictures(folder: Path, files: Mapping[str, Image.Image], name: str, content: Any) -> None:
    """Write pictures and the JSON file that says what they show; the folder is replaced."""

    def write(aside: Path) -> None:
        for file, picture in files.items():
            picture.save(aside / file, quality=82)
        write_json(aside / name, content)

    write_folder(folder, write)


def rows_of(
    facts: RunFacts, split: str, shown: Sequence[Shown], images: ImageData | None
) -> list[dict[str, Any] | None]:
    """The row of each image of a finished run, as `rows_in`; its recipe says where the images are when None.

    Raises:
        DataError: If the images aren't those of the run any more; names no place of this disk, as the page shows it.
    """
    return rows_in(images or _same_images(facts, split), split, shown)


def rows_in(images: ImageData, split: str, shown: Sequence[Shown]) -> list[dict[str, Any] | None]:
    """The row of each image; None for one that isn't there any more, or has another label."""
    rows: Dataset | None = images.splits.get(split)
    if rows is None:
        return [None] * len(shown)
    places = {file: place for place, file in enumerate(rows["file"][:])}
    found = [rows[places[one.file]] if one.file in places else None for one in shown]
    return [
        row if row is not None and images.labels[row["label"]] == one.label else None
        for row, one in zip(found, shown, strict=True)
    ]


def _same_images(facts: RunFacts, split: str) -> ImageData:
    """What the recipe finds, if the split still holds what it held."""
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


def small(picture: Image.Image) -> Image.Image:
    """An RGB picture, made no larger than the page shows it."""
    picture = picture.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return picture
