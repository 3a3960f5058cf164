"""`hfft find-lr`: a learning-rate range test of one phase, from the weights that the phases before it end with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.commands.job import open_job
from hfft.commands.plan import InMemory, resolve, with_weights_found
from hfft.errors import RecipeError
from hfft.recipe.loading import check_recipe
from hfft.recipe.spec import HubSpec, Recipe
from hfft.replay.replay import replay_folder
from hfft.system.launch import launched
from hfft.system.locking import RunLock
from hfft.training.model_selection import plain_network
from hfft.training.phases import run_phase
from hfft.training.range_test import RangeTest, run_range_test

_LOG = get_logger(__name__)


def find_lr(
    recipe: Recipe, *, phase: str | None = None, steps: int = 100, lowest: float = 1e-6, highest: float = 0.1
) -> RangeTest:
    """Try rising learning rates in one phase of a recipe; leaves no run folder.

    The phases before it are run first, in a temporary folder. What replay records of the images stays where a run of
    the recipe finds it.

    Args:
        recipe: The experiment.
        phase: Name of the phase; the last one when None.
        steps: Optimizer steps, each with a rate of its own, 10 at least.
        lowest: Rate of the first step.
        highest: Rate of the last step.

    Raises:
        HfftError: Whatever the user can mend.
    """
    if steps < 10 or not 0 < lowest < highest:
        raise RecipeError(f"{steps} steps from {lowest:g} to {highest:g}: allowed: 10 at least, rising from above 0")
    recipe, given = resolve(with_weights_found(check_recipe(recipe)), InMemory())
    names = [spec.name for spec in recipe.phases]
    if phase is not None and phase not in names:
        raise RecipeError(f"phase {phase!r}: the recipe has {', '.join(names)}")
    number = len(names) - 1 if phase is None else names.index(phase)
    rates = [float(rate) for rate in np.geomspace(lowest, highest, steps)]
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".find-lr-", dir=recipe.output_dir) as scratch:
        return _test(_without_extras(recipe, number, scratch), given, rates)


def _without_extras(recipe: Recipe, number: int, folder: str) -> Recipe:
    """The recipe up to a phase, in a folder of its own, without what is measured of a finished run."""
    return dataclasses.replace(
        recipe,
        output_dir=folder,
        phases=recipe.phases[: number + 1],
        replay=dataclasses.replace(recipe.replay, folder=str(replay_folder(recipe).absolute())),
        retain=dataclasses.replace(recipe.retain, measure=False, interpolate=None),
        hub=HubSpec(),
        folds=None,
        label_hints=False,
        report=False,
    )


def _test(recipe: Recipe, given: InMemory, rates: Sequence[float]) -> RangeTest:
    with RunLock(Path(recipe.output_dir) / recipe.name) as lock, launched():
        if PartialState().num_processes > 1:
            raise RecipeError("find-lr is for one process; start it without accelerate launch")
        job, network, _ = open_job(recipe, given, comments={}, callbacks=(), overwrite=False, lock=lock)
        results = []
        for phase in job.phases[:-1]:
            network, result = run_phase(network, phase, job.data, replay=job.replay)
            results.append(result)
            network = plain_network(network, job.processor, recipe, results, job.folder)
        found = run_range_test(network, job.phases[-1], job.data, replay=job.replay, rates=rates)
    advice = "the loss falls at no rate" if found.suggestion is None else f"learning_rate: {found.suggestion:.1e}"
    _LOG.info(f"{job.phases[-1].title}: {advice}; the loss is lowest at {found.lowest_loss_at:.1e}")
    return found
