"""A run that had ended and is asked for again: images that moved are compared, card and page are made if need be."""

from collections.abc import Collection
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import DatasetDict

from hfft.data.checking import Checked, check_images
from hfft.data.sources import ImageData, load_data
from hfft.distributed import meet
from hfft.folder import card_changes, check_same_images, has_other_source, update_card
from hfft.recipe.spec import Recipe
from hfft.report.facts import PAGE
from hfft.training.failures import explained

_LOG = get_logger(__name__)


def checked_images(images: ImageData, recipe: Recipe, data: DatasetDict | None) -> Checked:
    """The images of a recipe, or of data in memory, without those that can't be read."""

    def reload(gone: Collection[str]) -> ImageData:
        return load_data(recipe.data, recipe.seed, data, without=gone)

    return check_images(images, recipe.data, recipe.data.source if data is None else None, reload)


def update_finished(folder: Path, recipe: Recipe, data: DatasetDict | None) -> None:
    """Tell that a run is finished; card and page are written if the recipe asks for others than are there.

    Args:
        folder: Of the run.
        recipe: The run's, but for the card, and for places.
        data: Data in memory, instead of the recipe's.

    Raises:
        RunError: If the recipe's images are others than the run's.
    """
    state, changed, checked = PartialState(), card_changes(folder, recipe), None
    is_elsewhere = data is None and has_other_source(folder, recipe)
    if "widget" in changed or is_elsewhere:
        checked = checked_images(load_data(recipe.data, recipe.seed, data), recipe, data)
        check_same_images(folder, checked)
    meet()
    if changed:
        if state.is_main_process:
            with explained("card"):
                update_card(folder, recipe, checked if "widget" in changed else None)
        meet()
        told = ", ".join(f"{key} {getattr(recipe, key)}" for key in changed)
        _LOG.info(f"{folder}: the card was written anew: {told}")
    if recipe.report and not (folder / PAGE).is_file():
        if state.is_main_process:
            from hfft.report.card import write_report
            from hfft.report.page import try_page

            with explained("report"):
                write_report(folder)
            images = None if checked is None else checked.images
            try_page(folder, images, trust_remote_code=recipe.model.trust_remote_code)
        meet()
    _LOG.info(f"{folder} is finished; --overwrite runs it again")
