"""Which phase's model a run ends with: the best on the validation images, and why, in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass

from hfft.recipe.dependencies import is_greater_better
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.runs.record import ADAPTER, MODEL, PhaseResult
from hfft.training.callbacks import HEADLINES, headline_in

_MOST_DIGITS = 6


@dataclass(frozen=True)
class Selection:
    """The phase whose model is the run's result.

    Attributes:
        number: Of the phase, from 0.
        phase: Its name.
        reason: Why, in a sentence.
        values: What was compared, phase name to metric name to its value on the validation images.
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
    """The phase to keep of those that have ended.

    A phase is kept if its `metric_for_best_model` is better than that of the best phase before it; of equal ones the
    earlier is kept, which changed less. Without validation numbers, with `keep: last`, and before an
    interpolation, it is the last.

    Args:
        recipe: Its phases and `keep`.
        results: Of the first phases, or of all.
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
    texts = _told_apart(list(values.values()))
    told = ", ".join(f"{text} after {phases[n].name}" for n, text in zip(values, texts, strict=True))
    return f"{names} {verb} validation {steps[0].metric.replace('_', ' ')} ({told})"


def _told_apart(values: Sequence[float]) -> list[str]:
    """Three digits behind the point, or more where different values would look the same."""
    for digits in range(3, _MOST_DIGITS):
        texts = [f"{value:.{digits}f}" for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [f"{value:.{_MOST_DIGITS}f}" for value in values]
