"""A finished run that is asked for again: card and page are made if the recipe asks for others than are there."""

import dataclasses
from pathlib import Path

from accelerate.logging import get_logger
from datasets import DatasetDict

from hfft.commands.results import write_examples
from hfft.data.audit.filtering import check_images
from hfft.data.sources.reading import ImageData, choose_splits, read_source
from hfft.errors import RunError
from hfft.inference.opening import open_model
from hfft.model.given import fingerprints
from hfft.recipe.spec import Recipe
from hfft.runs.facts import read_facts
from hfft.runs.opening import card_changes, check_same_images, has_other_source
from hfft.runs.record import (
    FIGURES,
    PAGE,
    RunRecord,
    write_metrics,
    write_recipe,
)
from hfft.system.distributed import meet, on_main
from hfft.training.failures import failures_explained

_LOG = get_logger(__name__)


def update_finished(
    folder: Path, recipe: Recipe, data: DatasetDict | None, given: dict[str, str] | None = None
) -> None:
    """Tell that a run is finished; card and page are written if the recipe asks for others than are there.

    Args:
        folder: Of the run.
        recipe: The run's, but for the card, and for places.
        data: Data in memory, instead of the recipe's.
        given: Fingerprints of a model object, from `take_model`.

    Raises:
        RunError: If the recipe's images are others than the run's, or the run is that of another model object.
    """
    record = RunRecord(folder)
    if given is not None:
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
        on_main(lambda: _write_page(folder, recipe, images))
    _LOG.info(f"{folder} is finished; --overwrite runs it again")


def _check_model(record: RunRecord, recipe: Recipe, given: dict[str, str]) -> None:
    """A finished run began with the model object that is given now, or made it what it is now."""
    began_with = record.environment.get("model_given", given)  # older runs don't say
    if began_with is not None and began_with["weights"] == given["weights"]:
        return
    result, _ = open_model(str(record.model_dir), trust_remote_code=recipe.model.trust_remote_code)
    if fingerprints(result)["weights"] != given["weights"]:
        raise RunError(
            f"{record.folder} is finished, and was made from another model than the one given now; overwrite=True "
            "runs it again, another name keeps both"
        )


def _update_card(record: RunRecord, recipe: Recipe, images: ImageData | None) -> None:
    """Let a finished run's recipe and card say what another recipe for it says; the rest of the run stays."""
    from hfft.report.card import write_card

    with failures_explained("card"):
        if images is not None:
            examples = write_examples(record.model_dir, images, recipe.widget or 0)
            write_metrics(record.folder, {**record.metrics, "examples": examples})
        facts = dataclasses.replace(read_facts(record.folder), recipe=recipe)
        write_card(facts, sorted((record.folder / FIGURES).glob("*.png")))  # which show none of this
        write_recipe(record.folder, recipe)  # last: until then the card is to be written


def _write_page(folder: Path, recipe: Recipe, images: ImageData | None) -> None:
    from hfft.commands.report import try_page
    from hfft.report.card import write_report

    with failures_explained("report"):
        write_report(folder)
    try_page(folder, images, trust_remote_code=recipe.model.trust_remote_code)
