"""What happens between training steps: the data learns the epoch, progress is shown, history written, a stop saved."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from hfft.runs.record import PhaseRecord
from hfft.system.progress import bar
from hfft.system.signals import stop_signal

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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
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
            _LOG.info(f"{self._title}: {epochs}, {shown} on validation{self._speed(state)}")
        if "loss" in logs:
            self._show(loss=f"loss {logs['loss']:.3f}")
        metric = str(args.metric_for_best_model or "accuracy").removeprefix("eval_")
        if metric in metrics:
            self._facts.pop("now", None)
            self._show(metric=f"validation {metric.replace('_', ' ')} {metrics[metric]:.3f}")
        self._since_event()

    def close(self) -> None:
        """Leave the bar as it is, on a line of its own."""
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
