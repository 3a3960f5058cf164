"""Card, page and pictures of a finished run: made at its end, rendered anew, updated when it is asked for again."""

import dataclasses
import shutil
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import DatasetDict

from hfft.data.audit.filtering import check_images
from hfft.data.images.decoding import decode, read_content
from hfft.data.sources.labels import label_array, spoken_label, strata_of
from hfft.data.sources.reading import ImageData, choose_splits, images_of_run, read_source
from hfft.errors import HfftError, RunError, TrainingError, first_line
from hfft.evaluators.attribution import keep_mistakes
from hfft.evaluators.pictures import keep_label_pictures
from hfft.inference.classifier import Classifier
from hfft.inference.opening import open_model
from hfft.model.given import fingerprints
from hfft.recipe.spec import Recipe
from hfft.report.card import write_card, write_report
from hfft.runs.facts import read_facts
from hfft.runs.opening import card_changes, check_same_images, has_other_source, is_done
from hfft.runs.record import EXAMPLES, FIGURES, FIRST_BATCH, PAGE, RunRecord, write_metrics, write_recipe
from hfft.system.distributed import meet, on_main
from hfft.system.files import write_folder
from hfft.training.failures import failures_explained
from hfft.training.phase_data import draw_first_batch

_EXAMPLE_SIDE = 512  # pixels at most

_LOG = get_logger(__name__)


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
    record, first_batch = RunRecord(folder), Path(folder) / FIGURES / FIRST_BATCH
    if record.is_finished and not first_batch.exists():
        with suppress(HfftError, OSError):  # the images may be gone by now
            _, processor = _open(record.model_dir, trust_remote_code=trust_remote_code)
            draw_first_batch(first_batch, record.recipe, images_of_run(record.folder), processor)
    card, *figures = write_report(folder)
    return card, make_page(folder, trust_remote_code=trust_remote_code), *figures


def make_page(folder: str | Path, images: ImageData | None = None, *, trust_remote_code: bool = False) -> Path:
    """Write report.html of a finished run, and before it the pictures that it lacks.

    Args:
        folder: Of the run.
        images: The run's; looked for where its recipe says when None and pictures are missing.
        trust_remote_code: As for `report_run`.
    """
    from hfft.report.page import write_page  # and matplotlib

    facts = read_facts(folder)
    try:
        keep_mistakes(facts, images, open_model=partial(_open, trust_remote_code=trust_remote_code))
        keep_label_pictures(facts, images)
        return write_page(folder)
    except OSError as error:
        raise TrainingError(
            f"{facts.folder / PAGE}: can't be written: {error}; once it can, `hfft report {folder}` writes it"
        ) from error


def _open(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    classifier = Classifier.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return classifier.model, classifier.processor


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


def write_examples(result: Path, images: ImageData, count: int) -> list[dict[str, str]]:
    """Put some held-out images into the model folder, of each class in turn; small, and without what cameras note."""
    rows = images.splits.get("test", images.splits.get("validation"))
    if rows is None or count == 0:
        shutil.rmtree(result / EXAMPLES, ignore_errors=True)
        return []
    labels = strata_of(label_array(rows))
    by_class = [np.flatnonzero(labels == number).tolist() for number in np.unique(labels)]
    turns = [row for turn in zip_longest(*by_class) for row in turn if row is not None]
    chosen = [rows[row] for row in turns[:count]]

    def write(aside: Path) -> None:
        for number, row in enumerate(chosen):
            image = decode(read_content(row["image"]))
            image.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
            image.info = {}  # comments of the file
            image.save(aside / f"{number}.jpg", quality=90)

    write_folder(result / EXAMPLES, write)
    return [
        {"file": f"{EXAMPLES}/{number}.jpg", "label": spoken_label(row["label"], images.labels)}
        for number, row in enumerate(chosen)
    ]


def update_finished(
    recipe: Recipe, data: DatasetDict | None, given: dict[str, str] | None, *, overwrite: bool
) -> bool:
    """Whether this very recipe has been run; card and page are written if it asks for others than are there.

    Args:
        recipe: Resolved.
        data: Data in memory, instead of the recipe's.
        given: Fingerprints of a model object, from `take_model`.
        overwrite: Whether a run that is there doesn't count.

    Raises:
        RunError: As `is_done`, if the recipe's images are others than the run's, or the run is that of another model
            object.
    """
    folder = Path(recipe.output_dir) / recipe.name
    if not on_main(lambda: is_done(folder, recipe, overwrite=overwrite)):
        return False
    record = RunRecord(folder)
    _check_model(record, recipe, given)
    changed, images = card_changes(record, recipe), None
    if "widget" in changed or (data is None and has_other_source(record, recipe)):
        source = read_source(recipe.data, data)
        checked = check_images(source, choose_splits(source, recipe.data, recipe.seed), recipe.data, recipe.seed)
        check_same_images(record, checked.fingerprints)
        images = checked.images
    lacks_page = recipe.report and not (folder / PAGE).is_file()
    meet()  # all have looked
    if changed:
        on_main(lambda: _update_card(record, recipe, images if "widget" in changed else None))
        _LOG.info(f"{folder}: new card: {', '.join(f'{key} {getattr(recipe, key)}' for key in changed)}")
    if lacks_page:
        with failures_explained("report"):
            on_main(lambda: write_report(folder))
        on_main(lambda: try_page(folder, images, trust_remote_code=recipe.model.trust_remote_code))
    _LOG.info(f"{folder} is finished; --overwrite runs it again")
    return True


def _check_model(record: RunRecord, recipe: Recipe, given: dict[str, str] | None) -> None:
    """A finished run began with the model object that is given now, or made it what it is now."""
    began_with = record.environment.get("model_given", given)  # older runs don't say
    if given is None or (began_with is not None and began_with["weights"] == given["weights"]):
        return
    result, _ = open_model(str(record.model_dir), trust_remote_code=recipe.model.trust_remote_code)
    if fingerprints(result)["weights"] != given["weights"]:
        raise RunError(
            f"{record.folder} is finished, and was made from another model than the one given now; overwrite=True "
            "runs it again, another name keeps both"
        )


def _update_card(record: RunRecord, recipe: Recipe, images: ImageData | None) -> None:
    """Let a finished run's recipe and card say what another recipe for it says; the rest of the run stays."""
    with failures_explained("card"):
        if images is not None:
            examples = write_examples(record.model_dir, images, recipe.widget or 0)
            write_metrics(record.folder, {**record.metrics, "examples": examples})
        facts = dataclasses.replace(read_facts(record.folder), recipe=recipe)
        write_card(facts, sorted((record.folder / FIGURES).glob("*.png")))  # which show none of this
        write_recipe(record.folder, recipe)  # last: until then the card is to be written
