"""Pictures of the training labels that look most wrong, kept in the run's folder `label_issues/` for its page."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from hfft.data.sources.reading import ImageData
from hfft.errors import DataError
from hfft.evaluators.pictures import Shown, pictures_of, rows_of
from hfft.runs.facts import RunFacts
from hfft.runs.record import LABEL_HINTS, LABEL_ISSUES, LABEL_PICTURES
from hfft.system.files import read_json, write_folder, write_json

_LISTED = 12

_LOG = logging.getLogger(__name__)  # the main process alone gets here


@dataclasses.dataclass(frozen=True)
class PicturedIssues:
    """Training images whose label looks wrong.

    Attributes:
        images: How many were looked at.
        issues: How many of them look wrong.
        shown: Those that look most wrong; `prediction` is the class that an image may be of.
        left_out: Why none were looked for; empty where they were.
    """

    images: int
    issues: int
    shown: tuple[Shown, ...]
    left_out: str = ""


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
        for row in content["hints"][:_LISTED]
    )
    try:
        kept = tuple(Shown(**one) for one in read_json(folder / LABEL_PICTURES / "shown.json"))
    except (OSError, ValueError, TypeError):
        kept = ()
    if tuple(dataclasses.replace(one, picture=None, missing="") for one in kept) != chosen:
        kept = tuple(dataclasses.replace(one, missing="it was not kept") for one in chosen)
    return PicturedIssues(content["images"], len(content["hints"]), kept)


def keep_label_pictures(facts: RunFacts, images: ImageData | None = None) -> None:
    """Write the pictures of a run's label issues, unless all of them are there already.

    Args:
        facts: Of a finished run.
        images: The run's; looked for where its recipe says when None.
    """
    found = read_label_issues(facts.folder)
    if found is None or not any(one.missing for one in found.shown):
        return
    pictures: dict[int, Any] = {}
    try:
        pictures, missing = pictures_of(rows_of(facts, "train", found.shown, images))
    except DataError as error:
        _LOG.warning(f"{facts.folder}: no pictures of label issues: {error.__cause__ or error}")
        missing = dict.fromkeys(range(len(found.shown)), str(error))
    shown = [
        dataclasses.replace(one, picture=f"{n}.jpg" if n in pictures else None, missing=missing.get(n, ""))
        for n, one in enumerate(found.shown)
    ]

    def write(aside: Path) -> None:
        for number, picture in pictures.items():
            picture.save(aside / f"{number}.jpg", quality=82)
        write_json(aside / "shown.json", [dataclasses.asdict(one) for one in shown])

    write_folder(facts.folder / LABEL_PICTURES, write)
