"""Learning-rate range test of a phase: the rate rises at every step, and the loss shows which rates are useful."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from hfft.errors import RecipeError
from hfft.model.freezing import Freeze
from hfft.replay.replay import Replay
from hfft.training.averaging import MovingAverage
from hfft.training.failures import Diverged, failures_explained
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.plan import plan_phase, prepare_phase, with_solver
from hfft.training.settings import end_activation_checkpointing, training_arguments
from hfft.training.sharding import make_trainer
from hfft.training.trainer import PhaseTrainer

_WIDTH = 0.25  # of the mean over neighbouring rates, in decades
_ERRORS = 3.0  # standard errors that the loss has to fall by
_LATEST = 5  # batches, whose loss ends the test
_DIVERGED = 3.0  # times the loss at the start, that it has risen by
_LEAST_FALL = 0.02  # of the first loss; less is noise
_SCHEDULE = ("num_train_epochs", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "eval_steps")
_SCHEDULE += ("eval_delay",)


@dataclass(frozen=True)
class RangeTest:
    """What a range test found; https://hf.co/papers/1506.01186.

    Attributes:
        phase: Name of the phase.
        learning_rates: Rate of each step, as the recipe's `learning_rate` gives it.
        losses: Training loss of each step: the change of its batch's loss since the start, from the mean of those.
        smoothed: Their mean over neighbouring rates.
        suggestion: Rate at which the smoothed loss falls fastest; None where it falls by no more than the batches'
            noise.
        lowest_loss_at: Rate at which the smoothed loss is lowest; a useful rate is well below.
    """

    phase: str
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    lowest_loss_at: float


def run_range_test(
    model: Any,
    phase: PhaseRun,
    data: PhaseData,
    *,
    replay: Replay | None,
    rates: Sequence[float],
) -> RangeTest:
    """Train a phase with one step per rate, the lowest first; ends early where the loss rises far above its least.

    Layer decay and the rate of the head keep their ratios to the rate. Nothing is evaluated or saved.

    Args:
        model: A plain classifier with the weights that the phase starts from; is changed.
        phase: The phase.
        data: Images and loss.
        replay: Decides whether the frozen part is computed once.
        rates: Learning rates to try, rising.

    Raises:
        RecipeError: If the phase is solved, and has no learning rate.
    """
    set_seed(phase.seed)
    end_activation_checkpointing(model)
    pixels = data.floats(data.train[0]["pixel_values"].unsqueeze(0)).to(model.device)  # (1, C, H, W)
    model = prepare_phase(model, phase.spec, pixels)
    if with_solver(model, phase.spec).is_solved:
        raise RecipeError(f"phases.{phase.spec.name}: a solved head has no learning rate; try another phase")
    kept = {name: value for name, value in phase.spec.arguments.items() if name not in _SCHEDULE}
    own = {"max_steps": len(rates), "lr_scheduler_type": "constant", "logging_steps": 1, "eval_strategy": "no"}
    spec = dataclasses.replace(phase.spec, early_stopping=None, arguments={**kept, **own})
    arguments = training_arguments(spec, phase.folder, seed=phase.seed, validate=False, metric=data.headline)
    arguments.save_strategy = SaveStrategy.NO
    with failures_explained(phase.title, arguments):
        frozen_pass = data.frozen_pass(model, arguments, phase.title)
        replayed = None if replay is None else replay.open(frozen_pass, phase.number, phase.folder)
    groups = plan_phase(model, spec, images=len(data.train), processes=arguments.world_size).groups
    freeze = Freeze(model, batchnorm=spec.batchnorm)
    trainer = make_trainer(model, data, replayed, arguments, groups=groups, freeze=freeze, shards=None)
    paired = _PairedLoss(trainer, freeze.names)
    trainer.compute_loss = paired  # pyright: ignore[reportAttributeAccessIssue]
    rate = arguments.learning_rate or 1.0
    ratios = [float(group.learning_rate or 0) / rate for group in groups]
    trainer.add_callback(_RisingRate(paired, ratios, rates))
    bypassed = nullcontext() if replayed is None else replayed.split_point.bypassed()
    with bypassed, failures_explained(phase.title, arguments), suppress(Diverged):  # which ends the test
        trainer.train()
    first = float(np.mean(list(paired.first.values())))
    losses = [first + change for change in paired.changes.values() if math.isfinite(change)]
    return evaluate_range(spec.name, rates[: len(losses)], losses)


class _PairedLoss:
    """A trainer's loss that is compared with that of the same batch under the first weights.

    What the images of a batch make of its loss cancels out.
    """

    def __init__(self, trainer: PhaseTrainer, frozen: frozenset[str]) -> None:
        network: Any = trainer.model
        self._start = MovingAverage(1.0, network, frozen)  # which never moves
        self._trainer, self._compute = trainer, trainer.compute_loss
        self.first: dict[int, float] = defaultdict(float)  # by step, of all batches that it accumulates
        self.changes: dict[int, float] = defaultdict(float)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._start.applied(), torch.no_grad():
            first = self._compute(*args, **kwargs).item()
        loss = self._compute(*args, **kwargs)
        step = self._trainer.state.global_step
        self.first[step] += first
        self.changes[step] += loss.item() - first
        return loss


class _RisingRate(TrainerCallback):
    """Sets the rate of each step; ends the test where the loss is far above its start."""

    def __init__(self, paired: _PairedLoss, ratios: Sequence[float], rates: Sequence[float]) -> None:
        self._paired, self._ratios, self._rates = paired, ratios, rates

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = ratio * self._rates[state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        latest = list(self._paired.changes.values())[-_LATEST:]
        first = list(self._paired.first.values())
        if sum(latest) / len(latest) > _DIVERGED * sum(first) / len(first):
            control.should_training_stop = True


def evaluate_range(phase: str, rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Smooth the losses, and find the rate of the steepest fall if that is more than the batches' noise.

    Raises:
        RecipeError: If fewer than three steps had a loss.
    """
    if len(losses) < 3:
        raise RecipeError(f"phases.{phase}: the loss is no number after {len(losses)} steps; start at a lower rate")
    decades, values = np.log10(rates), np.array(losses)
    near = np.exp(-(((decades[:, None] - decades[None]) / _WIDTH) ** 2) / 2)  # (steps, steps)
    smoothed = near @ values / near.sum(axis=1)
    lowest = int(smoothed.argmin())
    first = decades < decades[0] + 1
    start = values[first].mean()
    noise = np.std(values[: lowest + 1] - smoothed[: lowest + 1])
    fall = start - smoothed[lowest]
    error = noise * math.sqrt(1 / first.sum() + 1 / near[lowest].sum())
    suggestion = None
    if lowest > 1 and fall > max(_ERRORS * error, _LEAST_FALL * start):
        begin = int(np.flatnonzero(smoothed[:lowest] >= start - 0.1 * fall).max(initial=0))
        slopes = np.gradient(smoothed[: lowest + 1], decades[: lowest + 1])
        suggestion = rates[begin + int(slopes[begin:].argmin())]
    return RangeTest(
        phase=phase,
        learning_rates=tuple(rates),
        losses=tuple(losses),
        smoothed=tuple(smoothed.tolist()),
        suggestion=suggestion,
        lowest_loss_at=rates[lowest],
    )
