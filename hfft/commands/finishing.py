"""A run that had ended and is asked for again: images that moved are compared, card and page are made if need be."""

from pathlib import Path

from accelerate.logging import get_logger
from datasets import DatasetDict

from hfft.commands.prepare import checked_images
from hfft.data.audit.filtering import Checked
from hfft.data.sources.reading import load_data
from hfft.errors import RunError
from hfft.inference.opening import open_model
from hfft.model.given import fingerprints
from hfft.recipe.spec import Recipe
from hfft.runs.facts import PAGE, result_name
from hfft.runs.record import card_changes, check_same_images, has_other_source, update_card
from hfft.system.distributed import meet, on_main
from hfft.system.files import read_json
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
    if given is not None:
        _check_model(folder, recipe, given)
    changed, checked = card_changes(folder, recipe), None
    is_elsewhere = data is None and has_other_source(folder, recipe)
    if "widget" in changed or is_elsewhere:
        checked = checked_images(load_data(recipe.data, recipe.seed, data), recipe, data)
        check_same_images(folder, checked)
    lacks_page = recipe.report and not (folder / PAGE).is_file()
    meet()  # all have looked
    if changed:
        on_main(lambda: _update_card(folder, recipe, checked if "widget" in changed else None))
        told = ", ".join(f"{key} {getattr(recipe, key)}" for key in changed)
        _LOG.info(f"{folder}: the card was written anew: {told}")
    if lacks_page:
        on_main(lambda: _write_page(folder, recipe, checked))
    _LOG.info(f"{folder} is finished; --overwrite runs it again")


def _update_card(folder: Path, recipe: Recipe, checked: Checked | None) -> None:
    with failures_explained("card"):
        update_card(folder, recipe, checked)


def _write_page(folder: Path, recipe: Recipe, checked: Checked | None) -> None:
    from hfft.report.card import write_report
    from hfft.report.page import try_page

    with failures_explained("report"):
        write_report(folder)
    images = None if checked is None else checked.images
    try_page(folder, images, trust_remote_code=recipe.model.trust_remote_code)


def _check_model(folder: Path, recipe: Recipe, given: dict[str, str]) -> None:
    """A finished run began with the model object that is given now, or made it what it is now."""
    began_with = read_json(folder / "environment.json").get("model_given", given)  # older runs don't say
    if began_with is not None and began_with["weights"] == given["weights"]:
        return
    result, _ = open_model(str(folder / result_name(recipe)), trust_remote_code=recipe.model.trust_remote_code)
    if fingerprints(result)["weights"] != given["weights"]:
        raise RunError(
            f"{folder} is finished, and was made from another model than the one given now; overwrite=True runs it "
            "again, another name keeps both"
        )
