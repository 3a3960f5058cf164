"""`hfft train PHOTOS`: facts on images, network and machine -> a recipe in which every value has its reason."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import constants, try_to_load_from_cache

from hfft.commands.plan import with_weights_found
from hfft.data.sources.advice import check_found
from hfft.data.sources.reading import load_data
from hfft.errors import ModelError, RecipeError, RunError
from hfft.model.checkpoint import load_checkpoint
from hfft.recipe.loading import RECIPE, dump_recipe, load_recipe
from hfft.recipe.spec import Recipe
from hfft.runs.record import RunRecord
from hfft.system.distributed import join, on_main
from hfft.system.files import expanded
from hfft.system.hub_lookup import hub_problem
from hfft.training.automatic import Setting, choose_checkpoint, measure_facts, propose

_LOCAL = "checkpoints/efficientnet_lite0"  # of the quick start, where there is no network

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Automatic:
    """A recipe that was chosen, or that of the run that goes on."""

    recipe: Recipe
    comments: Mapping[str, str]  # key to the reason of its value; "" to what was asked for
    seconds: Mapping[str, float]  # stage of the run to the seconds that it should take; empty for a run that goes on
    text: str  # of the recipe's file, with the reason behind each value

    @property
    def in_minutes(self) -> str:
        """What the run should take, for a line."""
        stages = ", ".join(f"{stage} {value / 60:.1f}" for stage, value in self.seconds.items())
        return f"about {sum(self.seconds.values()) / 60:.1f} min ({stages})"


def choose_recipe(
    source: str,
    *,
    checkpoint: str | None = None,
    minutes: float = 10.0,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> Automatic:
    """Choose a recipe for images, in every process the same; or take that of the run that the same call began.

    Args:
        source: As `data.source` of a recipe.
        checkpoint: As `model.checkpoint` of a recipe; one that suits device and budget when None.
        minutes: That the whole run may take.
        overrides: As for `load_recipe`; they win over what is chosen.
        overwrite: Whether a run that is there doesn't count.

    Raises:
        HfftError: If images or checkpoint can't be used, or the budget is too small.
    """
    source = str(Path(source))  # without a `/` at its end
    if not minutes > 0:
        raise RecipeError(f"minutes: found {minutes:g}; allowed: a number above 0")
    join()
    return on_main(lambda: _choose(source, checkpoint, minutes, overrides, overwrite=overwrite))


def _choose(
    source: str, checkpoint: str | None, minutes: float, overrides: Sequence[str], *, overwrite: bool
) -> Automatic:
    begun = time.monotonic()
    asked = {"checkpoint": checkpoint, "minutes": f"{minutes:g}"}
    options = [f"--{name} {value}" for name, value in asked.items() if value is not None]
    header = " ".join(["hfft train", source, *options, *overrides])
    first = [Setting("name", _name_of(source), "of the images"), Setting("data.source", source, "asked for")]
    early = [override for override in overrides if not override.startswith("phases.")]  # which are still to be chosen
    stub = [*first, Setting("model.checkpoint", checkpoint or "none", ""), Setting("phases.head.unfreeze", "head", "")]
    recipe = load_recipe(_content(stub), early)
    record = RunRecord(Path(recipe.output_dir) / recipe.name)
    if record.is_run and not overwrite:
        return _going_on(record, header)
    images = load_data(recipe.data, recipe.seed)
    check_found(images.splits["train"], source)
    if recipe.model.checkpoint == "none":
        found = _find_checkpoint(60 * minutes / sum(map(len, images.splits.values())))
    else:
        found = Setting("model.checkpoint", recipe.model.checkpoint, "asked for")
    recipe = load_recipe(_content([*first, found, *stub[-1:]]), early)
    model = load_checkpoint(with_weights_found(recipe).model, images.labels, is_multi_label=images.is_multi_label)
    facts = measure_facts(recipe, images, *model, begun=begun)
    proposal = propose(facts, minutes)
    choices = [*first, found, *proposal.choices]
    recipe = load_recipe(_content(choices), overrides)
    own = dict.fromkeys((override.partition("=")[0].strip() for override in overrides), "asked for")
    comments = {"": header, **{choice.key: choice.reason for choice in choices}, **own}
    chosen = Automatic(recipe, comments, proposal.seconds, dump_recipe(recipe, comments))
    _LOG.info(
        f"chosen: {recipe.model.checkpoint}, {', '.join(phase.name for phase in recipe.phases)}; {chosen.in_minutes}"
    )
    return chosen


def _going_on(record: RunRecord, header: str) -> Automatic:
    """The recipe of a run that the same words began; the measurements of today would give another one."""
    path = record.folder / RECIPE
    text = path.read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    if first != f"# {header}":
        found = f"`{first.removeprefix('# ')}`" if first.startswith("# hfft train ") else "another recipe"
        raise RunError(
            f"{record.folder} holds a run of {found}, and this is `{header}`; --overwrite replaces it, name=... makes "
            "a new one"
        )
    return Automatic(load_recipe(path), {}, {}, text)


def _name_of(source: str) -> str:
    """A name for a run on a folder, a file or a Hub id."""
    path = Path(expanded(source))
    name = path.resolve().stem if path.exists() else path.name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "photos"


def _content(choices: Sequence[Setting]) -> dict[str, Any]:
    """What a recipe's file holds."""
    content: dict[str, Any] = {"phases": []}
    for choice in choices:
        *path, key = choice.key.split(".")
        node = content
        if path[:1] == ["phases"]:
            if path[1] not in [phase["name"] for phase in content["phases"]]:
                content["phases"].append({"name": path[1]})
            node, path = content["phases"][-1], path[2:]
        for part in path:
            node = node.setdefault(part, {})
        node[key] = choice.value
    return content


def _find_checkpoint(seconds_per_image: float) -> Setting:
    """A checkpoint of the Hub, or where that can't be reached the quick start's."""
    chosen = choose_checkpoint(has_accelerator=torch.accelerator.is_available(), seconds_per_image=seconds_per_image)
    if isinstance(try_to_load_from_cache(chosen.value, "config.json"), str):
        return chosen
    problem = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else hub_problem(chosen.value, "model", None)
    if problem is None:
        return chosen
    if not (Path(_LOCAL) / "config.json").is_file():
        raise ModelError(
            f"model.checkpoint: {chosen.value} was chosen, and can't be loaded: {problem}; name a folder or a Hub id "
            "that was downloaded before with --checkpoint"
        )
    return Setting(chosen.key, _LOCAL, f"the quick start's, as {chosen.value} can't be loaded: {problem}")
