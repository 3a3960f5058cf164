"""The label hints of a run, with the pictures of the first of them, kept in its folder `label_hints/`."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from hfft.data.sources.reading import ImageData
from hfft.errors import DataError
from hfft.evaluators.pictures import Shown, pictures_of, rows_of
from hfft.runs.facts import RunFacts
from hfft.runs.record import HINT_PICTURES, LABEL_ISSUES
from hfft.system.files import read_json, write_folder, write_json

_LISTED = 12

_LOG = logging.getLogger(__name__)  # the main process alone gets here


@dataclasses.dataclass(frozen=True)
class Doubts:
    """Training images that may belong to another class.

    Attributes:
        images: How many were judged.
        hints: How many of them are hints.
        shown: The least believed; `prediction` is what an image may be.
        left_out: Why none were looked for; empty where they were.
    """

    images: int
    hints: int
    shown: tuple[Shown, ...]
    left_out: str = ""


def keep_doubts(facts: RunFacts, images: ImageData | None = None) -> Doubts | None:
    """Read a run's label hints and write the pictures of the first, unless they are there already.

    Args:
        facts: Of a finished run.
        images: The run's; looked for where its recipe says when None.

    Returns:
        None where the run has no label hints.
    """
    try:
        content: dict[str, Any] = read_json(facts.folder / LABEL_ISSUES)
    except FileNotFoundError:
        return None
    if content["left_out"] is not None:
        return Doubts(0, 0, (), content["left_out"])
    chosen = [
        Shown(row["file"], row["label"], row["believed"], row["label_probability"], row["believed_probability"])
        for row in content["hints"][:_LISTED]
    ]
    return Doubts(content["images"], len(content["hints"]), _illustrated(facts, chosen, images))


def _illustrated(facts: RunFacts, chosen: list[Shown], images: ImageData | None) -> tuple[Shown, ...]:
    """The images with the names of their pictures, which are in the folder then."""
    if not chosen:
        return ()
    before = _read(facts.folder)
    if [dataclasses.replace(one, picture=None) for one in before] == chosen:
        return before
    try:
        rows = rows_of(facts, "train", chosen, images)
    except DataError as error:
        _LOG.warning(f"{facts.folder}: no pictures of label hints: {error.__cause__ or error}")
        return tuple(dataclasses.replace(one, missing=str(error)) for one in chosen)
    pictures, missing = pictures_of(rows)
    shown = tuple(
        dataclasses.replace(one, missing=missing[place])
        if place in missing
        else dataclasses.replace(one, picture=f"{place}.jpg")
        for place, one in enumerate(chosen)
    )

    def write(aside: Path) -> None:
        for place, picture in pictures.items():
            picture.save(aside / f"{place}.jpg", quality=82)
        write_json(aside / "hints.json", [dataclasses.asdict(one) for one in shown])

    write_folder(facts.folder / HINT_PICTURES, write)
    return shown


def _read(folder: Path) -> tuple[Shown, ...]:
    """What a run folder keeps; nothing where that can't be read."""
    try:
        return tuple(Shown(**one) for one in read_json(folder / HINT_PICTURES / "hints.json"))
    except (OSError, ValueError, TypeError):
        return ()
