"""Weights between the model of the head phase and the final one (WiSE-FT, https://hf.co/papers/2109.01903).

Nothing is trained. BatchNorm statistics are interpolated like weights; recomputed ones would differ, so networks that
trained with `batchnorm: train` may be worse in between than at both ends, which the curve shows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.data.images.batches import Examples
from hfft.errors import RecipeError, TrainingError
from hfft.evaluators.features import as_before
from hfft.evaluators.protocol import Evaluator, Job, Result
from hfft.metrics.metrics import measure, tally
from hfft.metrics.multilabel import LabelOutcomes
from hfft.metrics.probabilities import softmax
from hfft.model.checkpoint import saved_weights
from hfft.model.restoring import left_as_it_was
from hfft.recipe.contradictions import is_greater_better
from hfft.replay.split_point import Prefix, SplitPoint, find_split_point
from hfft.runs.record import PhaseRecord
from hfft.system.distributed import meet
from hfft.training.settings import EVAL_BATCH

_LOG = get_logger(__name__)

ALPHAS = tuple(number / 10 for number in range(11))
"""Shares of the final weights that are tried: 0 is the head phase's model, 1 the final one."""
_IMAGES = 1000


@dataclass(frozen=True)
class Interpolation:
    """What was chosen."""

    alpha: float  # share of the final weights
    metric: str | None = None  # what decided; None where the recipe gave alpha
    images: int = 0  # of validation that were looked at
    curve: tuple[Mapping[str, float], ...] = ()  # by alpha, every metric on these; empty where nothing was tried


@dataclass(frozen=True)
class Trial:
    """What the values of alpha are tried on."""

    examples: Examples
    floats: Callable[[torch.Tensor], torch.Tensor]  # pixels of a batch to what the network takes
    metric: str
    greater_is_better: bool
    seed: int  # chooses the images where there are more than 1,000
    batch_size: int
    device: torch.device
    is_multi_label: bool = False


class WeightInterpolation(Evaluator):
    """Gives the network that a run ends with the interpolated weights, and keeps the curve."""

    name = "interpolation"

    def __init__(self) -> None:
        """Begin with nothing chosen."""
        self._found: Interpolation | None = None

    def before_saving(self, job: Job, network: Any) -> None:
        """Interpolate the weights of the main process's network, which is the one that is saved."""
        if PartialState().is_main_process:
            self._found = _interpolate(job, network)
        meet()

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """What was chosen, and the curve."""
        return None if self._found is None else dataclasses.asdict(self._found)


def _interpolate(job: Job, network: Any) -> Interpolation:
    heads = itertools.takewhile(lambda phase: phase.spec.trains_head_alone, job.phases)
    phase = list(heads)[-1]  # the recipe was checked for one
    weights = PhaseRecord(phase.folder).weights
    if weights is None:
        raise TrainingError(f"{phase.folder}: no result.json, so the interpolation has nowhere to begin")
    start = saved_weights(network, weights)
    asked = job.recipe.retain.interpolate
    found = find_alpha(network, start, _trial(job)) if asked == "auto" else Interpolation(float(asked or 0))
    interpolate(network, start, found.alpha)
    return found


def _trial(job: Job) -> Trial:
    data, arguments = job.data, job.phases[-1].spec.arguments
    if data.validation is None:
        raise RecipeError("retain.interpolate: 'auto' needs validation images, and there are none")
    return Trial(
        examples=data.validation,
        floats=data.floats,
        metric=str(arguments.get("metric_for_best_model") or data.headline).removeprefix("eval_"),
        is_multi_label=data.is_multi_label,
        greater_is_better=is_greater_better(arguments),
        seed=job.recipe.seed,
        batch_size=arguments.get("per_device_eval_batch_size", EVAL_BATCH),
        device=torch.device(str(PartialState().device)),
    )


def interpolate(network: Any, start: Mapping[str, torch.Tensor], alpha: float) -> None:
    """Give a network `(1 - alpha)` of other weights and buffers plus `alpha` of its own.

    Integers, such as BatchNorm's count of batches, stay.
    """
    _Interpolator(network, start).set(alpha)


class _Interpolator:
    """Sets the weights of a network between other weights and its own."""

    def __init__(self, network: Any, start: Mapping[str, torch.Tensor]) -> None:
        """Keep both ends of what differs, where the network is."""
        own = network.state_dict()
        if odd := sorted(start.keys() ^ own.keys()):
            raise TrainingError(f"interpolation: only one of the head phase's model and the final one has {odd[:5]}")
        begins = {name: start[name].to(tensor.device) for name, tensor in own.items() if tensor.is_floating_point()}
        self.differing = {name: own[name] for name, begin in begins.items() if not torch.equal(begin, own[name])}
        self._ends = {name: (begins[name], tensor.clone()) for name, tensor in self.differing.items()}

    def set(self, alpha: float) -> None:
        """Give the network `(1 - alpha)` of the other weights plus `alpha` of its own."""
        for name, tensor in self.differing.items():
            begin, end = self._ends[name]
            tensor.copy_(end) if alpha == 1 else torch.lerp(begin, end, alpha, out=tensor)


def find_alpha(network: Any, start: Mapping[str, torch.Tensor], trial: Trial) -> Interpolation:
    """Try all values of alpha between weights of the head phase's model and the network's own, which stay.

    The best one is chosen, and of equals the smallest: nearest to the head phase's model. What no value changes is
    computed once for each image.
    """
    device = network.device
    chosen = np.sort(np.random.default_rng(trial.seed).permutation(len(trial.examples))[:_IMAGES])
    interpolator = _Interpolator(network.to(trial.device), start)
    try:
        with left_as_it_was(network):
            logits, labels = _try_all(network.eval(), interpolator, trial, chosen)
    finally:
        interpolator.set(1)
        network.to(device)
    curve = []
    for alpha in ALPHAS:
        answers = np.concatenate(logits[alpha])  # (N, K)
        if trial.is_multi_label:
            found = LabelOutcomes.of_logits(answers, labels).metrics
        else:
            found = measure(tally(softmax(answers), labels))
        curve.append({"alpha": alpha, **found})
    sign = 1 if trial.greater_is_better else -1
    best = max(curve, key=lambda point: sign * point[trial.metric])  # the first of equals
    _LOG.info(
        f"interpolation: {best['alpha']:g} of the way from the head phase to the end has the best "
        f"{trial.metric.replace('_', ' ')} on {len(labels)} validation images: {best[trial.metric]:.4f}, which is "
        f"{curve[0][trial.metric]:.4f} at 0 and {curve[-1][trial.metric]:.4f} at 1"
    )
    return Interpolation(best["alpha"], trial.metric, len(labels), tuple(curve))


def _try_all(
    network: Any, interpolator: _Interpolator, trial: Trial, chosen: np.ndarray
) -> tuple[dict[float, list[np.ndarray]], np.ndarray]:
    """Logits by alpha, in batches, and the labels, (N,) or (N, K)."""
    logits: dict[float, list[np.ndarray]] = {alpha: [] for alpha in ALPHAS}
    labels: list[Any] = []
    split_point: SplitPoint | None = None
    for begin in range(0, len(chosen), trial.batch_size):
        batch = [trial.examples[int(index)] for index in chosen[begin : begin + trial.batch_size]]
        labels += [one["label"] for one in batch]
        pixels = trial.floats(torch.stack([one["pixel_values"] for one in batch]).to(trial.device))  # (B, C, H, W)
        split_point = split_point if begin else _split_point(network, interpolator, pixels[:1])
        with torch.no_grad():
            entering = (pixels,) if split_point is None else Prefix(network, [split_point])(pixels)
            for alpha in ALPHAS:
                interpolator.set(alpha)
                logits[alpha].append(_run(network, split_point, entering))
    return logits, np.asarray(labels)


def _run(network: Any, split_point: SplitPoint | None, entering: tuple[torch.Tensor, ...]) -> np.ndarray:
    if split_point is None:
        return network(pixel_values=entering[0]).logits.float().cpu().numpy()  # (B, K)
    with split_point.bypassed():
        return network(pixel_values=split_point.feed(entering)).logits.float().cpu().numpy()


def _split_point(network: Any, interpolator: _Interpolator, pixels: torch.Tensor) -> SplitPoint | None:
    """The last split point in front of all that differs between both ends."""
    with as_before(network):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in interpolator.differing)
        trains = any(parameter.requires_grad for parameter in network.parameters())
        split_point = find_split_point(network, pixels) if trains else None
    if split_point is None:
        return None
    behind = {tensor.data_ptr() for tensor in split_point.behind}
    return split_point if all(tensor.data_ptr() in behind for tensor in interpolator.differing.values()) else None
