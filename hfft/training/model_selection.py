"""Which phase's model a run ends with, the best on the validation images and why; its weights and adapter."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hfft.model.adapters import merge, save_adapter
from hfft.model.checkpoint import restore_weights, save_model
from hfft.recipe.contradictions import is_greater_better
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.runs.record import ADAPTER, GIVEN, MODEL, PhaseRecord, PhaseResult, RunRecord
from hfft.system.distributed import meet
from hfft.training.callbacks import HEADLINES, headline_in

_MOST_DIGITS = 6


@dataclass(frozen=True)
class Selection:
    """The phase whose model is the run's result; `kept` in metrics.json.

    Attributes:
        number: The phase's, from 0.
        phase: Its name.
        reason: Why, in a sentence.
        values: What was compared: phase name to metric name to its value on the validation images.
    """

    number: int
    phase: str
    reason: str
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Step:
    """A later phase against the best one before it."""

    metric: str
    before: int
    after: int
    values: tuple[float, float]
    is_better: bool


def select_phase(recipe: Recipe, results: Sequence[PhaseResult]) -> Selection:
    """Select a phase of those that have ended.

    It is the best by each phase's `metric_for_best_model`; of equal ones the earlier, which changed less. Without
    validation numbers, with `keep: last`, and before an interpolation, it is the last.

    Args:
        recipe: The run's.
        results: Of all phases, or of the first ones.
    """
    phases = recipe.phases[: len(results)]
    last = len(phases) - 1
    adapter = phases[last].adapter
    why = None
    if last == 0:
        why = f"{phases[0].name} is the only phase"
    elif recipe.keep == "last":
        why = "the recipe says keep: last"
    elif recipe.retain.interpolate is not None:
        why = "weights are interpolated between the head phase's and the last one's"
    elif not any(result.metrics for result in results):
        why = "no phase was measured on validation images"
    steps = [] if why is not None else _compare(phases, results)
    best = next((step.after for step in reversed(steps) if step.is_better), 0) if why is None else last
    values = {phases[n].name: {} for step in steps for n in (step.before, step.after)}
    for step in steps:
        for number, value in zip((step.before, step.after), step.values, strict=True):
            values[phases[number].name][step.metric] = value
    words = why or _in_words(steps, phases, best)
    folder = MODEL
    if adapter is not None and not adapter.merge:  # the recipe asks for this folder, which no other phase can give
        words += "" if best == last else ", but adapter.merge: false asks for the adapter"
        folder, best = ADAPTER, last
    name = phases[best].name
    return Selection(best, name, f"{words}: {folder}/ is that of {name}", values)


def keep_given(model: Any, processor: Any, recipe: Recipe, folder: Path) -> None:
    """Save a model object that a run begins with, if there is one, where an adapter will name it as its base."""
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
        recipe: The run's.
        results: Of this phase and those before it.
        folder: The run folder.
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


def restore_selected(network: Any, recipe: Recipe, selection: Selection, folder: Path) -> None:
    """Put the weights of the selected phase into the plain network of the last one; another's adapter folder goes."""
    meet()  # the main process has written what is read here
    if selection.number < len(recipe.phases) - 1:
        weights = _phase(folder, recipe, selection.number).weights
        assert weights is not None
        restore_weights(network, weights)
    if recipe.phases[selection.number].adapter is None and PartialState().is_main_process:
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)


def _compare(phases: Sequence[PhaseSpec], results: Sequence[PhaseResult]) -> list[_Step]:
    """Each phase after the first against the best one before it; one without numbers is taken for better."""
    steps: list[_Step] = []
    best = 0
    for number in range(1, len(phases)):
        arguments = phases[number].arguments
        metric = str(arguments.get("metric_for_best_model") or _headline(results)).removeprefix("eval_")
        before, after = (results[n].metrics.get(metric, float("nan")) for n in (best, number))
        greater = is_greater_better(arguments)
        is_better = not (after <= before if greater else after >= before)  # NaN, of a phase without numbers, is
        steps.append(_Step(metric, best, number, (before, after), is_better))
        best = number if is_better else best
    return steps


def _headline(results: Sequence[PhaseResult]) -> str:
    """What phases are judged by, unless they say otherwise."""
    return next((name for result in results if (name := headline_in(result.metrics))), HEADLINES[0])


def _in_words(steps: Sequence[_Step], phases: Sequence[PhaseSpec], best: int) -> str:
    failed = [step for step in steps if step.after > best]
    if not failed:
        return _sentence([step for step in steps if step.after == best], phases, "improved")
    metrics = list(dict.fromkeys(step.metric for step in failed))
    return "; ".join(
        _sentence([step for step in failed if step.metric == metric], phases, "did not improve") for metric in metrics
    )


def _sentence(steps: Sequence[_Step], phases: Sequence[PhaseSpec], verb: str) -> str:
    """For example `last-blocks did not improve validation accuracy (0.861 after head, 0.853 after last-blocks)`."""
    values = {n: value for step in steps for n, value in zip((step.before, step.after), step.values, strict=True)}
    if any(value != value for value in values.values()):
        return "not every phase was measured on validation images"
    names = " and ".join(phases[step.after].name for step in steps)
    texts = _distinct(list(values.values()))
    compared = ", ".join(f"{text} after {phases[n].name}" for n, text in zip(values, texts, strict=True))
    return f"{names} {verb} validation {steps[0].metric.replace('_', ' ')} ({compared})"


def _distinct(values: Sequence[float]) -> list[str]:
    """Three digits behind the point, or more where different values would look the same."""
    for digits in range(3, _MOST_DIGITS):
        texts = [f"{value:.{digits}f}" for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [f"{value:.{_MOST_DIGITS}f}" for value in values]


def _base(recipe: Recipe, number: int, folder: Path) -> tuple[str, str | None]:
    """Base model of a phase's adapter, and its revision: the checkpoint, or weights in the run folder."""
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
    """Whether the network's body is still the checkpoint's when a phase begins."""
    return all(phase.trains_head_alone for phase in recipe.phases[:number])
