"""`hfft choose`: which checkpoint suits these photos; what it records serves the run that follows."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from hfft.commands.finetune import ddp_timeout
from hfft.commands.job import load_network, make_job, precision_of
from hfft.commands.plan import with_weights_found
from hfft.data.audit.filtering import Checked, check_images
from hfft.data.images.resize_mode import copy_fit, fit_processor
from hfft.data.sources.reading import choose_splits, read_source
from hfft.errors import DataError, MissingPackageError, ModelError, RecipeError
from hfft.evaluators.candidates import Candidate, difference, measure_candidate
from hfft.metrics.scores import Scores
from hfft.model.config import load_processor
from hfft.model.given import open_config
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import Recipe
from hfft.system.distributed import join, on_main
from hfft.system.progress import bars

_OWN_KEYS = ("name", "model.checkpoint", "data.source", "phases")


@dataclass(frozen=True)
class Choice:
    """Checkpoints, the one that suits the images best first; those that can't be measured come last.

    Attributes:
        images: How many there are by split.
        metric: The headline metric, by which the candidates are sorted.
        candidates: One for each checkpoint.
    """

    images: dict[str, int]
    metric: str
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> str:
        """The checkpoint that comes first."""
        return self.candidates[0].checkpoint

    def to_dict(self) -> dict[str, Any]:
        """As `hfft choose --json` prints it."""
        return {"best": self.best, **dataclasses.asdict(self)}


def choose(
    source: str, checkpoints: Sequence[str], overrides: Sequence[str] = (), *, trust_remote_code: bool = False
) -> Choice:
    """Compare checkpoints by what a linear probe and nearest neighbours make of their features, without training.

    Features are recorded as a run's head phase records them, so that a run on the same images finds them. Images are
    read, split and left out as a run does it; nothing is measured on test images.

    Args:
        source: What `data.source` of a recipe may be.
        checkpoints: Folders or Hub ids.
        overrides: `key=value` as for `load_recipe`, such as `data.label_column=kind`.
        trust_remote_code: Whether Python code that checkpoints bring may run.

    Raises:
        RecipeError: If an override is wrong.
        DataError: If the images can't be used, or none are left for validation.
        ModelError: If no checkpoint can be measured; says why for each.
    """
    recipes = [_recipe(source, checkpoint, overrides, trust_remote_code) for checkpoint in dict.fromkeys(checkpoints)]
    join(ddp_timeout(recipes[0]))
    with bars(shown=not recipes[0].training.get("disable_tqdm", False)):
        data, seed = recipes[0].data, recipes[0].seed
        rows = read_source(data, None)
        checked = check_images(rows, choose_splits(rows, data, seed), data, seed)
        images = checked.images
        if "validation" not in images.splits:
            raise DataError(f"{source}: no validation images to compare on; add data.splits.validation=0.15")
        if len(images.labels) < 2:
            raise DataError(f"{source}: all images are of one class, {', '.join(images.labels)}; two are needed")
        found = [_try(recipe, checked) for recipe in recipes]
    works = [one for one in found if isinstance(one, tuple)]
    failed = [one for one in found if isinstance(one, Candidate)]
    if not works:
        problems = [f"{one.checkpoint}: {one.problem}" for one in failed]
        raise ModelError("\n".join(["no checkpoint can be measured:", *problems]))
    metric = works[0][1].headline
    works.sort(key=lambda pair: (-(pair[1].metrics[metric]["value"] or 0), pair[1].metrics["log_loss"]["value"]))
    (first, best), *others = works
    behind = [dataclasses.replace(one, difference=difference(scores, best)[metric]) for one, scores in others]
    return Choice({split: len(part) for split, part in images.splits.items()}, metric, (first, *behind, *failed))


def _recipe(source: str, checkpoint: str, overrides: Sequence[str], trust_remote_code: bool) -> Recipe:
    """The recipe whose head phase records what is measured here."""
    own = [override for override in overrides if override.partition("=")[0].startswith(_OWN_KEYS)]
    if own:
        raise RecipeError(f"{own[0]}: `choose` sets {', '.join(_OWN_KEYS)} itself; leave it out")
    content = {
        "name": "choose",
        "model": {"checkpoint": checkpoint, "trust_remote_code": trust_remote_code},
        "data": {"source": source},
        "phases": [{"name": "head", "unfreeze": "head", "num_train_epochs": 1}],
    }
    return load_recipe(content, overrides)


def _try(recipe: Recipe, checked: Checked) -> tuple[Candidate, Scores] | Candidate:
    """A candidate and its scores; without scores, one that says why it can't be measured."""
    checkpoint, images = recipe.model.checkpoint, checked.images
    try:
        recipe = with_weights_found(recipe)
        config = open_config(recipe.model, images.labels, is_multi_label=images.is_multi_label)
        processor = fit_processor(load_processor(recipe.model, config), config, recipe.data)
        network: Any = load_network(recipe, images)
        copy_fit(config, network.config)
        precision = precision_of(recipe, network, processor, None)
        job = make_job(recipe, processor, checked, precision, load=partial(load_network, recipe, images))
        candidate, scores = measure_candidate(job, network, checkpoint)
    except (ModelError, MissingPackageError) as error:
        return Candidate(checkpoint, problem=str(error))
    return dataclasses.replace(candidate, license=on_main(lambda: _license(checkpoint))), scores


def _license(checkpoint: str) -> str:
    """By the metadata of the checkpoint's card, in its folder or on the Hub."""
    readme = Path(checkpoint) / "README.md"
    if Path(checkpoint).is_dir() and not readme.is_file():
        return "unknown"
    try:
        card = ModelCard.load(readme if readme.is_file() else checkpoint)
    except (OSError, ValueError, HfHubHTTPError, httpx2.TransportError):  # no card, or no metadata that can be read
        return "unknown"
    return str(card.data.get("license") or "unknown")
