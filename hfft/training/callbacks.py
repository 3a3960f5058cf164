"""What happens beside the training steps: the epoch told to the data, progress shown, history written, stops."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import EarlyStoppingCallback, TrainerCallback

from hfft.runs.phase_record import PhaseRecord
from hfft.system.progress import Bar, bar
from hfft.system.signals import stop_signal
from hfft.training.eta import RunClock

HEADLINES = ("accuracy", "mean_average_precision")
"""What results are judged by, unless a recipe says otherwise: where images have one label, and any number of them."""
_LOG = get_logger(__name__)


def headline_in(metrics: Mapping[str, Any]) -> str | None:
    """The headline among names of metrics; None where there is none."""
    return next((name for name in HEADLINES if name in metrics), None)


def is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the Trainer's log holds the metrics of an evaluation."""
    return headline_in({key.removeprefix("eval_"): value for key, value in entry.items()}) is not None


class EpochSetter(TrainerCallback):
    """Tells the training examples which epoch begins; Accelerate does not when processes share the images."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the epoch on."""
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))


class HistoryWriter(TrainerCallback):
    """Keeps history.jsonl: one line per logged step or evaluation, of this process and of those it continues."""

    def __init__(self, record: PhaseRecord) -> None:
        """Choose the phase."""
        self.record = record

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the file from the Trainer's own log, which a continued phase restores."""
        if state.is_world_process_zero:
            self.record.write_history(state.log_history)


class Stopper(TrainerCallback):
    """Saves and ends where a signal has asked for it, in all processes after the same step."""

    def __init__(self, title: str) -> None:
        """Choose what the log calls the phase."""
        self._title = title
        self._stops = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save now, if any process was asked to stop; after an epoch's last step once that epoch was evaluated."""
        self._stops = stop_signal() is not None
        if args.world_size > 1:
            asked = torch.tensor(float(self._stops), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self._stops = bool(asked)
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

    The images per second are those of the training, in a line since the line before, without evaluating, logging and
    saving. Between the end of a step and the begin of the next one the Trainer does these, each followed by an event
    of its own, and then nothing but fetch the next step's batches (`_run_epoch`, read in transformers 5.24).
    """

    def __init__(self, title: str, images: int, clock: RunClock | None = None, number: int = 0) -> None:
        """Choose what to show.

        Args:
            title: For example `phase 1/2 head`.
            images: Training images per epoch.
            clock: Knows the rest of the run, and is told how fast this phase was.
            number: Of the phase, from 0.
        """
        super().__init__()
        self.title = title
        self.images = images
        self._clock = clock
        self._number = number
        self._bar: Bar | None = None
        self._epoch = 0.0  # at the last line
        self._computing = self._waiting = 0.0  # seconds since then
        self._event = 0.0  # time of the last event
        self._begin = (0.0, 0.0)  # epoch and time
        self._trained = 0.0  # seconds, before the last line
        self._facts: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, unless bars are off."""
        self._epoch = float(state.epoch or 0)
        self._begin = (self._epoch, time.monotonic())
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = bar(self.title, state.max_steps, unit="steps", shown=True)
            self._bar.initial = self._bar.n = state.global_step
            if self._clock is not None:
                self._bar.after = partial(self._clock.left_after, self._number)
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
            seconds = self._trained + self._computing + self._waiting
            if seconds > 0:
                self._bar.speed = f"{self.images * (float(state.epoch) - self._begin[0]) / seconds:,.0f} images/s"
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say why the bar stands still."""
        if self._bar is not None and "now" not in self._facts:
            self._show(now="validating")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, and remember how fast the phase was."""
        epoch, begun = self._begin
        if self._clock is not None:
            images = round(self.images * (float(state.epoch or 0) - epoch))
            self._clock.note_trained(self._number, images, time.monotonic() - begun)
        self.close()

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
            _LOG.info(f"{self.title}: {epochs}, {shown} on validation{self._speed(float(state.epoch or 0))}")
        if "loss" in logs:
            self._show(loss=f"loss {logs['loss']:.3f}")
        metric = str(args.metric_for_best_model or "accuracy").removeprefix("eval_")
        if f"eval_{metric}" in logs:
            self._facts.pop("now", None)
            self._show(metric=f"validation {metric.replace('_', ' ')} {logs[f'eval_{metric}']:.3f}")
        self._since_event()

    def close(self) -> None:
        """Leave the bar as it is, on a line of its own."""
        if self._bar is not None:
            self._bar.after = None
            self._bar.close()
            self._bar = None

    def _show(self, **facts: str) -> None:
        self._facts |= facts
        if self._bar is not None:
            self._bar.facts = tuple(self._facts.values())
            self._bar.refresh()

    def _speed(self, epoch: float) -> str:
        """Speed since the last line, which begins anew."""
        seconds = self._computing + self._waiting
        if seconds == 0:  # an evaluation before the first step
            return ""
        rate, share = self.images * (epoch - self._epoch) / seconds, 100 * self._waiting / seconds
        self._trained += seconds
        self._epoch, self._computing, self._waiting = epoch, 0.0, 0.0
        return f", {rate:.0f} images/s, {share:.0f} % waiting for data"

    def _since_event(self) -> float:
        """Seconds since the last event; this is one."""
        now = time.monotonic()
        passed, self._event = now - self._event, now
        return passed
