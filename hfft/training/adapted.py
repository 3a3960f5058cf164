"""What is left of a phase's adapter: a plain network for the next phase, and a folder where it was the last one."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hfft.model.adapters import merge, save_adapter
from hfft.model.checkpoint import save_model
from hfft.recipe.spec import Recipe
from hfft.training.phases import finished_phase

_MERGED = "merged"  # below an adapter phase's folder, when another adapter comes after it


def plain_network(network: Any, processor: Any, recipe: Recipe, number: int, folder: Path) -> PreTrainedModel:
    """The network after a phase, with an adapter merged into it.

    The adapter is saved when it is the last thing trained, and so is what the next one sits on.

    Args:
        network: As the phase left it.
        processor: Its image processor.
        recipe: With the phases.
        number: Of the phase, from 0.
        folder: The run's folder.
    """
    if recipe.phases[number].adapter is None:
        return network
    is_main = PartialState().is_main_process
    if number < len(recipe.phases) - 1:
        network = merge(network)
        if is_main and recipe.phases[number + 1].adapter is not None:
            save_model(network, processor, folder / f"{number}-{recipe.phases[number].name}" / _MERGED)
        return network
    if is_main:
        base, revision = _base(recipe, number, folder)
        save_adapter(network, processor, folder / "adapter", base=base, revision=revision)
    return merge(network)


def _base(recipe: Recipe, number: int, folder: Path) -> tuple[str, str | None]:
    """What the adapter of a phase sits on, and its revision: the checkpoint, or weights that only this run has."""
    if all(phase.adapter is None and phase.unfreeze == "head" for phase in recipe.phases[:number]):
        checkpoint, revision = recipe.model.checkpoint, recipe.model.revision
        return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint, revision
    before = folder / f"{number - 1}-{recipe.phases[number - 1].name}"
    result = finished_phase(before)
    assert result is not None
    return str((before / (_MERGED if recipe.phases[number - 1].adapter else result.checkpoint)).resolve()), None
