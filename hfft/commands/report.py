"""Card, figures and page of a finished run, rendered anew; pictures that the page lacks are made before."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from hfft.data.sources.reading import ImageData
from hfft.errors import TrainingError, first_line
from hfft.evaluators.attribution import keep_mistakes
from hfft.evaluators.pictures import keep_label_pictures
from hfft.inference.classifier import Classifier
from hfft.report.card import write_report
from hfft.report.page import write_page
from hfft.runs.facts import read_facts
from hfft.runs.record import PAGE

_LOG = logging.getLogger(__name__)  # the main process alone gets here


def report_run(folder: str | Path, *, trust_remote_code: bool = False) -> tuple[Path, ...]:
    """Render a finished run anew.

    Args:
        folder: Of the run.
        trust_remote_code: Runs the Python code that the model brings, where it brings some; without it, the page
            doesn't show where such a network looks.

    Returns:
        What was written: card, page, figures.

    Raises:
        RunError: If it is no run folder, the run isn't finished, or its files can't be read.
        TrainingError: If something can't be written.
    """
    card, *figures = write_report(folder)
    return card, make_page(folder, trust_remote_code=trust_remote_code), *figures


def make_page(folder: str | Path, images: ImageData | None = None, *, trust_remote_code: bool = False) -> Path:
    """Write report.html of a finished run, and before it the pictures that it lacks.

    Args:
        folder: Of the run.
        images: The run's; looked for where its recipe says when None and pictures are missing.
        trust_remote_code: As for `report_run`.

    Raises:
        RunError: As `report_run`.
        TrainingError: If page or pictures can't be written.
    """
    facts = read_facts(folder)
    try:
        keep_mistakes(facts, images, open_model=partial(_open, trust_remote_code=trust_remote_code))
        keep_label_pictures(facts, images)
        return write_page(folder)
    except OSError as error:
        raise TrainingError(
            f"{facts.folder / PAGE}: can't be written: {error}; once it can, `hfft report {folder}` writes it"
        ) from error


def try_page(folder: Path, images: ImageData | None, *, trust_remote_code: bool = False) -> None:
    """`make_page` at the end of a run, which has succeeded whatever becomes of its page; the log says which."""
    try:
        page = make_page(folder, images, trust_remote_code=trust_remote_code)
    except Exception as error:  # hours of training are not lost for a picture
        why = f"{type(error).__name__}: {first_line(error)}"
        _LOG.warning(f"{folder / PAGE} was not written: {why}; the run is whole, and")
        _LOG.warning(f"`hfft report {folder}` tries it again")
        return
    _LOG.info(f"report: {page}")


def _open(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    classifier = Classifier.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return classifier.model, classifier.processor
