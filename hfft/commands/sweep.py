"""A grid of runs of one recipe, one after the other in one process, so that they share recordings and imports."""

import gc
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.commands.finetune import finetune
from hfft.errors import HfftError, RecipeError, RunError
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import Recipe

_LOG = get_logger(__name__)
_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Sweep:
    """What became of the runs."""

    finished: tuple[Path, ...]  # folders of the runs that are finished, in the order of the grid
    failed: dict[str, str]  # name of a run that failed, to why


def plan_sweep(source: str | Path, assignments: Sequence[str]) -> list[Recipe]:
    """The recipes of a grid; nothing but text is looked at.

    A run is called after the recipe and what is its own: `NAME-learning_rate-1e-3-unfreeze-blocks_2`.

    Args:
        source: YAML file of the recipe.
        assignments: `key=value` as overrides have it, or `key=value1,value2`: commas outside of brackets divide.

    Raises:
        RecipeError: If no key has several values, a recipe isn't right or pushes its result, or two of them would have
            the same name.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or key in values:
            raise RecipeError(f"{assignment!r}: write each key once, as key=value or key=value1,value2")
        values[key] = _divided(text)
    varied = [key for key, choices in values.items() if len(choices) > 1]
    if not varied or "name" in varied:
        raise RecipeError("a sweep needs a key other than name with several values, as key=value1,value2")
    fixed = [f"{key}={choices[0]}" for key, choices in values.items() if key not in varied]
    short = _short(varied)
    base = load_recipe(source, fixed).name
    recipes = []
    for choice in itertools.product(*(values[key] for key in varied)):
        own = [f"{key}={value}" for key, value in zip(varied, choice, strict=True)]
        parts = [f"{short[key]}-{_plain(value)}" for key, value in zip(varied, choice, strict=True)]
        name = "-".join([base, *parts])
        recipes.append(load_recipe(source, [*fixed, *own, f"name={name}"]))
    pushed = [recipe.hub.repo_id for recipe in recipes if recipe.hub.repo_id is not None]
    if pushed:
        raise RecipeError(
            f"hub.repo_id: found {pushed[0]}, where the last run of a sweep would end and not the best; leave it out "
            f"(hub.repo_id=null), and push the one that you want: hfft push {recipes[0].output_dir}/NAME {pushed[0]}"
        )
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeError(f"two runs of the sweep would be called {twice}; leave one of the values out")
    return recipes


def sweep(recipes: Sequence[Recipe]) -> Sweep:
    """Run recipes one after the other; finished ones are left alone, and one that fails doesn't stop the others.

    Args:
        recipes: From `plan_sweep`.

    Raises:
        RunError: If several processes were launched, of which one may fail alone.
    """
    if PartialState().num_processes > 1:
        raise RunError("a sweep runs in one process; launch each recipe by itself to share it among several")
    finished, failed = [], {}
    for number, recipe in enumerate(recipes, start=1):
        _LOG.info(f"run {number} of {len(recipes)}: {recipe.name}")
        try:
            finished.append(finetune(recipe).folder)
        except HfftError as error:
            _LOG.error(f"{recipe.name} failed: {error}")
            failed[recipe.name] = str(error)
        gc.collect()  # the network of the run before, which callbacks and hooks hold in cycles
    return Sweep(tuple(finished), failed)


def _divided(text: str) -> list[str]:  # at commas that are in no brackets
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise RecipeError(f"{text!r}: a value is missing before or after a comma")
    return [part.strip() for part in parts]


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Of each key as many of its last words as tell it from the others."""
    short = {}
    for key in keys:
        words = key.split(".")
        endings = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        others = [f".{other}" for other in keys if other != key]
        short[key] = _plain(next((e for e in endings if not any(o.endswith(f".{e}") for o in others)), key))
    return short


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_")
