"""Callbacks of a phase: epochs, progress, history, stopping, and whether what trains really moves."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from hfft.errors import TrainingError
from hfft.model.anatomy import PEFT_PREFIX
from hfft.runs.record import Group, PhaseRecord
from hfft.system.progress import bar
from hfft.system.signals import stop_signal

HEADLINES = ("accuracy", "mean_average_precision")
"""What results are judged by, unless a recipe says otherwise: where images have one label, and any number of them."""
_CHECK_AFTER = 8  # steps: LoRA's A and what is behind a head of zeros start late
_LEAST_STEPS = 4  # of a shorter phase, a tensor without a gradient is no fault
_STEPS_MORE = 4  # in which tensors that haven't moved are compared whole
_COMPARED = 64  # numbers of a tensor that are compared first
_SHOWN = 3

_LOG = get_logger(__name__)


def headline_in(metrics: Mapping[str, Any]) -> str | None:
    """The headline among names of metrics; None where there is none."""
    return next((name for name in HEADLINES if name in metrics), None)


def is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the Trainer's log holds the metrics of an evaluation."""
    return headline_in({key.removeprefix("eval_"): value for key, value in entry.items()}) is not None


class EpochSetter(TrainerCallback):
    """Sets the epoch of the training examples; Accelerate doesn't where processes share the images."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the epoch on."""
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))


class HistoryWriter(TrainerCallback):
    """Keeps history.jsonl: one line per log entry, those before an interruption included."""

    def __init__(self, record: PhaseRecord) -> None:
        """Choose the phase."""
        self._record = record

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the file from the Trainer's own log, which a continued phase restores."""
        if state.is_world_process_zero:
            self._record.write_history(state.log_history)


class Stopper(TrainerCallback):
    """Saves and ends where a signal asked for it, in all processes after the same step."""

    def __init__(self, title: str) -> None:
        """Choose what the log calls the phase."""
        self._title = title
        self._stops = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save now, if any process was asked to stop; after an epoch's last step once that epoch was evaluated."""
        (self._stops,) = _in_any_process(args, [torch.tensor(stop_signal() is not None)])
        is_last = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        control.should_save = control.should_save or (self._stops and not is_last)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is whole."""
        if self._stops:
            _LOG.info(f"{self._title}: stopped after step {state.global_step}, which is saved")
            raise KeyboardInterrupt


class PhaseEarlyStopping(EarlyStoppingCallback):
    """A phase's `early_stopping`; of a class of its own, so that a user's callback isn't restored in its place."""


class PhaseProgress(TrainerCallback):
    """A progress bar for the phase, and one line per evaluation.

    The images per second are those of the training since the line before, without evaluating, logging and saving.
    Between the end of a step and the begin of the next one the Trainer does these, each followed by an event of its
    own, and then nothing but fetch the next step's batches (`_run_epoch`, read in transformers 5.24).
    """

    def __init__(self, title: str, images: int) -> None:
        """Choose the title, for example `phase 1/2 head`, and the training images per epoch."""
        self._title = title
        self._images = images
        self._bar: tqdm | None = None
        self._facts: dict[str, str] = {}
        self._epoch = 0.0  # at the last line
        self._computing = self._waiting = 0.0  # seconds since then
        self._event = 0.0  # time of the last event

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, unless bars are off."""
        self._epoch = float(state.epoch or 0)
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = bar(self._title, state.max_steps, unit="steps", shown=True)
            self._bar.initial = self._bar.n = state.global_step
            self._bar.refresh()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starting the workers that read images is waiting for data, too."""
        self._since_event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches are there."""
        self._waiting += self._since_event()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._computing += self._since_event()
        if self._bar is not None:
            self._show(speed=f"{self._rate(state):,.0f} images/s", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say why the bar stands still."""
        if "now" not in self._facts:
            self._show(now="validating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The time of an evaluation is not the training's."""
        self._facts.pop("now", None)
        self._since_event()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nor is that of saving."""
        self._since_event()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say how an evaluation went."""
        logs = logs or {}
        metrics = {key[5:]: value for key, value in logs.items() if key.startswith("eval_")}
        headline = headline_in(metrics)
        if state.is_world_process_zero and headline is not None:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            numbers = {"loss": loss, headline.replace("_", " "): metrics[headline], "macro F1": metrics["macro_f1"]}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value is not None)
            epochs = f"epoch {state.epoch:g} of {args.num_train_epochs:g}"
            _LOG.info(f"{self._title}: {epochs}, {shown} on validation{self._speed(state)}")
        if "loss" in logs:
            self._show(loss=f"loss {logs['loss']:.3f}")
        metric = str(args.metric_for_best_model or "accuracy").removeprefix("eval_")
        if metric in metrics:
            self._facts.pop("now", None)
            self._show(metric=f"validation {metric.replace('_', ' ')} {metrics[metric]:.3f}")
        self._since_event()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it is, on a line of its own."""
        self.close()

    def close(self) -> None:
        """End the bar, also of a training that failed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, *, refresh: bool = True, **facts: str) -> None:
        self._facts |= facts
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._facts.values()), refresh)

    def _rate(self, state: Any) -> float:
        """Images per second since the last line."""
        seconds = self._computing + self._waiting
        return self._images * (float(state.epoch or 0) - self._epoch) / seconds if seconds > 0 else 0.0

    def _speed(self, state: Any) -> str:
        """Speed since the last line, which begins anew."""
        seconds = self._computing + self._waiting
        if seconds == 0:  # an evaluation before the first step
            return ""
        words = f", {self._rate(state):.0f} images/s, {100 * self._waiting / seconds:.0f} % waiting for data"
        self._epoch, self._computing, self._waiting = float(state.epoch or 0), 0.0, 0.0
        return words

    def _since_event(self) -> float:
        """Seconds since the last event; this is one."""
        now = time.monotonic()
        passed, self._event = now - self._event, now
        return passed


class FirstSteps(TrainerCallback):
    """Checks in the first optimizer steps that all that a phase trains gets a gradient and moves.

    A step counts if the optimizer took it, at a rate above 0. A few numbers of each tensor are compared with those
    before the first step; only tensors of which none of these has changed are compared whole.
    """

    def __init__(self, title: str, groups: Sequence[Group]) -> None:
        """Take what the log calls the phase, such as `phase 1/2 head`, and the plan's groups of what trains."""
        self._title = title
        self._parts = {name: group.part for group in groups for name in group.names}
        self._steps = 0
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._had_gradient: set[str] = set()
        self._watched: dict[str, torch.Tensor] = {}  # whole copies
        self._nonzero: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy a few numbers of each tensor, or of this process's shard of it."""
        self._steps, self._watched, self._had_gradient = 0, {}, set()
        found = {name.removeprefix("module."): value for name, value in kwargs["model"].named_parameters()}
        self._parameters = {name: found[name] for name in self._parts if name in found}
        self._before = {name: _some(value) for name, value in self._trained().items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients, which are still there."""
        if not self._before or not _counts(kwargs.get("optimizer")):
            return
        self._steps += 1
        self._had_gradient |= {name for name, value in self._trained().items() if value.grad is not None}
        for name in self._watched:
            gradient = self._parameters[name].grad
            if gradient is not None:
                self._nonzero[name] = self._nonzero[name] | _local(gradient).any()
        if self._steps == _CHECK_AFTER:
            still = self._check_gradients(args)
            self._watched = {name: _local(self._parameters[name].detach()).clone() for name in still}
            self._nonzero = {name: torch.tensor(False, device=value.device) for name, value in self._watched.items()}
        elif self._steps == _CHECK_AFTER + _STEPS_MORE:
            self._report(args, kwargs.get("optimizer"))
            self._before, self._watched = {}, {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of a phase with few steps, only tensors without any gradient are a fault."""
        if self._before and _LEAST_STEPS <= self._steps < _CHECK_AFTER:
            self._check_gradients(args)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What trains by the plan, without what a user's callback has frozen since."""
        return {name: value for name, value in self._parameters.items() if value.requires_grad}

    def _check_gradients(self, args: Any) -> list[str]:
        """Names of the tensors of which no number that was taken has changed in any process; each had a gradient.

        An optimizer that takes all gradients away is left alone.
        """
        trained = self._trained()
        names = [name for name in trained if name in self._before]
        changed = _in_any_process(args, [(_some(trained[name]) != self._before[name]).any() for name in names])
        still = [name for name, has_changed in zip(names, changed, strict=True) if not has_changed]
        flags = [*(name in self._had_gradient for name in still), bool(self._had_gradient)]
        *had, any_had = _in_any_process(args, [torch.tensor(flag) for flag in flags])
        lacking = [name for name, one in zip(still, had, strict=True) if any_had and not one]
        if lacking:
            raise TrainingError(
                f"{self._title}: {len(lacking)} of {len(trained)} tensors that should train got no gradient in "
                f"{self._steps} steps and stay as they are, such as {_listed(lacking)}. Something in the recipe, in a "
                "callback or in the network's own code cuts their gradient off"
            )
        return still

    def _report(self, args: Any, optimizer: Any) -> None:
        """Log why tensors that didn't move in the last steps either stay as they are."""
        trained = self._trained()
        names = [name for name in self._watched if name in trained]
        moved = _in_any_process(args, [(_local(trained[n].detach()) != self._watched[n]).any() for n in names])
        pulled = _in_any_process(args, [self._nonzero[name] for name in names])
        groups = getattr(optimizer, "param_groups", ())
        rates = {id(parameter): group.get("lr") for group in groups for parameter in group["params"]}
        resting = {
            name: pull
            for name, has_moved, pull in zip(names, moved, pulled, strict=True)
            if not has_moved and rates.get(id(trained[name])) != 0
        }
        too_small = [name for name, pull in resting.items() if pull]
        zero = [name for name, pull in resting.items() if not pull]
        if too_small:
            log = _LOG.warning if 2 * len(too_small) > len(trained) else _LOG.info
            log(
                f"{self._title}: {len(too_small)} of {len(trained)} tensors have a gradient and don't move, such as "
                f"{_listed(too_small)}: each step is lost in the rounding of {trained[too_small[0]].dtype}; is the "
                "learning rate too small?"
            )
        parts = {self._parts[name] for name in zero} - {self._parts[name] for name in trained if name not in zero}
        nothing = f"every gradient was exactly zero in the first {self._steps} steps"
        if parts:
            where = ", ".join(sorted(parts))
            _LOG.warning(f"{self._title}: {where}: nothing is trained there, as {nothing}")
        elif zero:
            few = f"{len(zero)} of {len(trained)} tensors, such as {_listed(zero)}"
            _LOG.info(f"{self._title}: {few}, don't move, as {nothing}")


def _counts(optimizer: Any) -> bool:
    """Whether an optimizer took the step, at a rate above 0; loss scaling skips steps, a warm-up begins at 0."""
    if getattr(optimizer, "step_was_skipped", False):
        return False
    rates = [group.get("lr") for group in getattr(optimizer, "param_groups", ())]
    return not rates or any(rate is None or rate > 0 for rate in rates)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Copies of a few of a tensor's numbers, evenly spread; of this process's part of it."""
    flat = _local(tensor.detach()).reshape(-1)
    return flat[:: max(1, len(flat) // _COMPARED)].clone()


def _in_any_process(args: Any, flags: Sequence[torch.Tensor]) -> list[bool]:
    """Of each flag, whether it is set in any process; for all processes together."""
    if not flags:
        return []
    found = torch.stack([flag.float() for flag in flags])
    if args.world_size > 1:
        found = found.to(args.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.removeprefix(PEFT_PREFIX) for name in names[:_SHOWN])
