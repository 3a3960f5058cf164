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
    """A later phase against the best one before it: phase number to value of the metric, the later one last."""

    metric: str
    values: dict[int, float]
    is_better: bool

    @property
    def number(self) -> int:
        return max(self.values)


def select_phase(recipe: Recipe, results: Sequence[PhaseResult]) -> Selection:
    """Select a phase of those that have ended, all of the recipe or the first ones.

    It is the best by each phase's `metric_for_best_model`; of equal ones the earlier, which changed less. Without
    validation numbers, with `keep: last`, and before an interpolation, it is the last.
    """
    phases = recipe.phases[: len(results)]
    last = len(phases) - 1
    rules = {
        f"{phases[0].name} is the only phase": last == 0,
        "the recipe says keep: last": recipe.keep == "last",
        "weights are interpolated between the head phase's and the last one's": recipe.retain.interpolate is not None,
        "no phase was measured on validation images": not any(result.metrics for result in results),
    }
    reason = next((rule for rule, holds in rules.items() if holds), None)
    values: dict[str, dict[str, float]] = {}
    best = last
    if reason is None:
        steps = _compare(phases, results)
        best = next((step.number for step in reversed(steps) if step.is_better), 0)
        reason = _in_words(steps, phases, best)
        for step in steps:
            for number, value in step.values.items():
                values.setdefault(phases[number].name, {})[step.metric] = value
    folder, adapter = MODEL, phases[last].adapter
    if adapter is not None and not adapter.merge:  # the recipe asks for this folder, which no other phase can give
        reason += "" if best == last else ", but adapter.merge: false asks for the adapter"
        folder, best = ADAPTER, last
    name = phases[best].name
    return Selection(best, name, f"{reason}: {folder}/ is that of {name}", values)


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
    """The network after the last phase of `results`, with an adapter merged into it.

    The adapter is saved in the run folder if it is the best so far; the merged network, in the phase's folder, where
    another phase follows: the run may end with it, or another adapter sits on it.
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
    headline = next((name for result in results if (name := headline_in(result.metrics))), HEADLINES[0])
    steps: list[_Step] = []
    best = 0
    for number in range(1, len(phases)):
        arguments = phases[number].arguments
        metric = str(arguments.get("metric_for_best_model") or headline).removeprefix("eval_")
        values = {n: results[n].metrics.get(metric, float("nan")) for n in (best, number)}
        before, after = values.values()
        is_better = not (after <= before if is_greater_better(arguments) else after >= before)  # NaN is, too
        steps.append(_Step(metric, values, is_better))
        best = number if is_better else best
    return steps


def _in_words(steps: Sequence[_Step], phases: Sequence[PhaseSpec], best: int) -> str:
    """For example `last-blocks did not improve validation accuracy (0.861 after head, 0.853 after last-blocks)`."""
    failed = [step for step in steps if step.number > best]
    named, verb = (failed, "did not improve") if failed else ([s for s in steps if s.number == best], "improved")
    sentences = []
    for metric in dict.fromkeys(step.metric for step in named):
        same = [step for step in named if step.metric == metric]
        values = {number: value for step in same for number, value in step.values.items()}
        if any(value != value for value in values.values()):
            sentences.append("not every phase was measured on validation images")
            continue
        names = " and ".join(phases[step.number].name for step in same)
        pairs = zip(values, _distinct(list(values.values())), strict=True)
        compared = ", ".join(f"{text} after {phases[number].name}" for number, text in pairs)
        sentences.append(f"{names} {verb} validation {metric.replace('_', ' ')} ({compared})")
    return "; ".join(sentences)


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
