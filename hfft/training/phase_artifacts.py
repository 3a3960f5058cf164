"""What is left of the phases: a plain network for the next one, an adapter folder, and the model that is kept."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hfft.model.adapters import merge, save_adapter
from hfft.model.checkpoint import restore_weights, save_model
from hfft.recipe.spec import Recipe
from hfft.runs.record import ADAPTER, GIVEN, PhaseRecord, PhaseResult, RunRecord
from hfft.system.distributed import meet
from hfft.training.model_selection import Selection, select_phase


def keep_given(model: Any, processor: Any, recipe: Recipe, folder: Path) -> None:
    """Save a model object that a run begins with, where an adapter sits on it, which then names it as its base.

    Args:
        model: The object, as the first phase gets it, if there is one.
        processor: Its image processor.
        recipe: Of the run.
        folder: Of the run.
    """
    if model is None or (folder / GIVEN).is_dir() or not PartialState().is_main_process:
        return
    adapters = [number for number, phase in enumerate(recipe.phases) if phase.adapter is not None]
    if any(_sits_on_start(recipe, number) for number in adapters):
        save_model(model, processor, folder / GIVEN)


def plain_network(
    network: Any, processor: Any, recipe: Recipe, results: Sequence[PhaseResult], folder: Path
) -> PreTrainedModel:
    """The network after a phase, with an adapter merged into it.

    The adapter is saved if it is the best so far; the merged network, in the phase's folder, where another phase
    follows: the run may end with it, or another adapter sits on it.

    Args:
        network: As the phase left it.
        processor: Its image processor.
        recipe: Of the run.
        results: Of this phase and those before it.
        folder: Of the run.
    """
    number = len(results) - 1
    if recipe.phases[number].adapter is None:
        return network
    is_last, is_main = number == len(recipe.phases) - 1, PartialState().is_main_process
    may_be_kept = is_last or (recipe.keep == "best" and results[number].metrics)
    if is_main and may_be_kept and select_phase(recipe, results).number == number:
        base, revision = _base(recipe, number, folder)
        save_adapter(network, processor, folder / ADAPTER, base=base, revision=revision)
    network = merge(network)
    if is_main and not is_last:
        save_model(network, processor, _phase(folder, recipe, number).merged)
    meet()
    return network


def restore_kept(network: Any, recipe: Recipe, results: Sequence[PhaseResult], kept: Selection, folder: Path) -> None:
    """Put the weights of the phase that is kept into a network, and remove the adapter folder of another one.

    Args:
        network: Plain; of the last phase.
        recipe: Of the run.
        results: Of all phases.
        kept: From `select_phase`.
        folder: Of the run.
    """
    state = PartialState()
    meet()  # the main process has written what is read here
    phase = recipe.phases[kept.number]
    if kept.number < len(results) - 1:
        weights = _phase(folder, recipe, kept.number).weights
        assert weights is not None
        restore_weights(network, weights)
    if state.is_main_process and phase.adapter is None:
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)


def _base(recipe: Recipe, number: int, folder: Path) -> tuple[str, str | None]:
    """What the adapter of a phase sits on, and its revision: the checkpoint, or weights that only this run has."""
    if _sits_on_start(recipe, number):
        if (folder / GIVEN).is_dir():
            return f"../{GIVEN}", None
        checkpoint, revision = recipe.model.checkpoint, recipe.model.revision
        return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint, revision
    weights = _phase(folder, recipe, number - 1).weights
    assert weights is not None
    return f"../{weights.relative_to(folder).as_posix()}", None  # the run may be moved


def _phase(folder: Path, recipe: Recipe, number: int) -> PhaseRecord:
    return RunRecord(folder).phase(number, recipe.phases[number].name)


def _sits_on_start(recipe: Recipe, number: int) -> bool:
    """Whether the body of the network is what the run began with when a phase begins."""
    return all(phase.trains_head_alone for phase in recipe.phases[:number])
