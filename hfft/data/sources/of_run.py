"""The images of a run that has ended, found again where its recipe says."""

from pathlib import Path

from hfft.data.sources.advice import missing_path
from hfft.data.sources.reading import ImageData, load_data
from hfft.errors import DataError
from hfft.recipe.loading import read_recipe
from hfft.system.files import expanded, recall


def images_of_run(folder: Path) -> ImageData:
    """What the recipe of a run finds, without the images that the run left out as they can't be read.

    Those of a folder or a file are not looked for on the Hub, where the same name may be that of somebody's data set.

    Args:
        folder: Of the run; where it was downloaded from the Hub, its recipe alone.

    Raises:
        DataError: If they aren't there any more. Whether they are still the same isn't looked at.
    """
    recipe, origin = read_recipe(folder), recall(folder / "environment.json").get("origin", {}).get("data", {})
    source = recipe.data.source
    if origin.get("kind") == "local" and not Path(expanded(source)).exists():
        raise DataError(f"data.source of {folder}: {missing_path(source)}")
    gone = [skip["file"] for skip in recall(folder / "data.json").get("skipped", ())]
    return load_data(recipe.data, recipe.seed, without=gone)
