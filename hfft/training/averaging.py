"""A phase's `average`: a moving one of its weights while it trains, or the mean of some checkpoints at its end."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from hfft.model.config import quiet
from hfft.system.distributed import meet
from hfft.system.files import read_json, write_folder

UNAVERAGED = "unaveraged.pt"
"""File of a checkpoint: the weights as they train, where those of the checkpoint are their moving average."""
AVERAGE = "average"
"""Folder of the mean of a phase's checkpoints."""

_LOG = get_logger(__name__)
_Weights = dict[str, torch.Tensor]


class MovingAverage(TrainerCallback):
    """An exponential moving average of all that a phase changes.

    The decay of step t is at most (1 + t) / (10 + t), as in timm, so that short phases forget their start. BatchNorm
    statistics that train are averaged too: those of the last step belong to weights that the average isn't at.
    """

    def __init__(self, decay: float, model: nn.Module, frozen: frozenset[str]) -> None:
        """Begin with the present weights; `frozen` are the names of those that the phase leaves alone."""
        self._decay = decay
        self._model = model
        self._frozen = frozen
        self._averages = {name: tensor.detach().clone() for name, tensor in _changing(model, frozen).items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take an optimizer step's weights in; counters are those of the step."""
        decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        pairs = [(self._averages[name], tensor) for name, tensor in _changing(self._model, self._frozen).items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)([average for average, _ in floats], [present for _, present in floats], None)
        for average, present in pairs:
            if not average.is_floating_point():
                average.copy_(present)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, folder: Path) -> None:
        """Write the weights as they train into a checkpoint, while the average is applied."""
        torch.save({name: tensor.cpu() for name, tensor in self._averages.items()}, folder / UNAVERAGED)

    def resume(self, folder: Path) -> None:
        """Take the average from the model, which was loaded from a checkpoint, and give it the trained weights."""
        for name, tensor in torch.load(folder / UNAVERAGED, map_location="cpu", weights_only=True).items():
            self._averages[name].copy_(tensor)
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in _changing(self._model, self._frozen).items():
            present = tensor.clone()
            tensor.copy_(self._averages[name])
            self._averages[name].copy_(present)


def begin_average(trainer: Any, average: Mapping[str, float] | None, frozen: frozenset[str]) -> None:
    """Set a PhaseTrainer up for a phase's `average`; `frozen` are the names of what the phase leaves alone."""
    if average is None:
        return
    if "ema" not in average:
        trainer.average = average
        if trainer.args.save_total_limit == 1:  # at 1 the Trainer removes all but the best when it ends
            trainer.args.save_total_limit = 2
        return
    trainer.moving = MovingAverage(average["ema"], trainer.model, frozen)
    trainer.add_callback(trainer.moving)


def average_checkpoints(trainer: Any, frozen: frozenset[str], title: str) -> dict[str, Any]:
    """End a phase with the mean of some of its checkpoints, or with the best one where that is better on validation.

    A greedy soup adds, from the best checkpoint on, each that doesn't make the mean worse
    (https://hf.co/papers/2203.05482).

    Returns:
        Names of the `checkpoints` that went in, whether their mean is `kept`, and its validation `metrics`.
    """
    (kind,) = trainer.average
    steps = averaged_steps(trainer.average, trainer.folder, trainer.state, trainer.args)
    weights = [_weights(trainer, step, frozen) for step in steps]
    metric, sign = _judge(trainer.args)
    single = trainer.state.best_metric  # None without validation images
    chosen, metrics, value = list(range(len(steps))), {}, single
    if kind == "soup":
        chosen = [0]
        for number in range(1, len(steps)):
            tried = _measure_mean(trainer, [weights[one] for one in (*chosen, number)], frozen)
            if sign * (tried[metric] - value) >= 0:
                chosen, metrics, value = [*chosen, number], tried, tried[metric]
    _put_mean(trainer, [weights[one] for one in chosen], frozen)
    if single is not None and not metrics:
        metrics = _measure(trainer)
        value = metrics[metric]
    is_kept = kind == "last" or (len(chosen) > 1 and single is not None and sign * (value - single) >= 0)
    names = [f"checkpoint-{steps[one]}" for one in chosen]
    scores = "" if single is None else f": {metric} {value:.4f}, of the best one {single:.4f}"
    _LOG.info(f"{title}: mean of {', '.join(names)}{scores}; {'the mean' if is_kept else 'the best one'} is kept")
    if is_kept:
        _save(trainer)
    else:
        trainer.load_weights(trainer.folder / f"checkpoint-{trainer.state.best_global_step}")
    return {"checkpoints": names, "kept": is_kept, "metrics": {k: v for k, v in metrics.items() if k != "loss"}}


def averaged_steps(
    average: Mapping[str, float], folder: Path, state: TrainerState, arguments: TrainingArguments
) -> list[int]:
    """Steps of the checkpoints that a mean is made of, as far as there are any: best first, for `last` newest first.

    What an interruption saves between two evaluations doesn't count: an uninterrupted phase doesn't have it.
    """
    ((kind, count),) = average.items()
    steps = [int(Path(path).name.removeprefix("checkpoint-")) for path in sort_checkpoints(str(folder))]
    steps = [step for step in reversed(steps) if step <= state.global_step]
    metric, sign = _judge(arguments)
    if arguments.eval_strategy == "no":
        values = {step: 0.0 for step in steps if _is_regular(folder / f"checkpoint-{step}", state)}
    else:
        values = {entry["step"]: entry[f"eval_{metric}"] for entry in state.log_history if f"eval_{metric}" in entry}
    found = [step for step in steps if step in values]
    if kind != "last":
        found.sort(key=lambda step: (-sign * values[step], step))  # of equal ones the first, as Trainer has it
    return found[: int(count)]


def remove_others(
    average: Mapping[str, float], folder: Path, state: TrainerState, arguments: TrainingArguments
) -> None:
    """Remove a phase's checkpoints but for the newest, the best, and those that the mean would be made of now."""
    best = state.best_global_step or state.global_step
    kept = {f"checkpoint-{step}" for step in (best, *averaged_steps(average, folder, state, arguments))}
    limit = arguments.save_total_limit or 0
    for path in map(Path, sort_checkpoints(str(folder))[: -limit or None] if limit > 0 else ()):
        if path.name not in kept:
            shutil.rmtree(path)


def _changing(model: nn.Module, frozen: frozenset[str]) -> _Weights:
    """The parameters and buffers of a model that a phase may change, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in frozen}


def _judge(arguments: TrainingArguments) -> tuple[str, int]:
    """The metric of the best checkpoint, and 1 where more of it is better, else -1."""
    return str(arguments.metric_for_best_model).removeprefix("eval_"), 1 if arguments.greater_is_better else -1


def _is_regular(checkpoint: Path, state: TrainerState) -> bool:
    saved = read_json(checkpoint / "trainer_state.json")
    return float(saved["epoch"]).is_integer() or saved["global_step"] >= state.max_steps


def _weights(trainer: Any, step: int, frozen: frozenset[str]) -> _Weights:
    trainer.load_weights(trainer.folder / f"checkpoint-{step}")
    return {name: tensor.cpu().clone() for name, tensor in _changing(trainer.model, frozen).items()}


def _put_mean(trainer: Any, weights: Sequence[_Weights], frozen: frozenset[str]) -> None:
    """Give the model the mean of some weights, taken in float64; of counters the highest."""
    for name, tensor in _changing(trainer.model, frozen).items():
        values = torch.stack([one[name] for one in weights])
        tensor.copy_(values.double().mean(0) if tensor.is_floating_point() else values.amax(0))


def _measure(trainer: Any) -> dict[str, float]:
    """Validation metrics of the present weights, by name, of which nothing is logged."""
    found = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation").metrics or {}
    return {name.removeprefix("eval_"): value for name, value in found.items()}


def _measure_mean(trainer: Any, weights: Sequence[_Weights], frozen: frozenset[str]) -> dict[str, float]:
    _put_mean(trainer, weights, frozen)
    return _measure(trainer)


def _save(trainer: Any) -> None:
    if trainer.args.should_save:
        with quiet():
            write_folder(trainer.folder / AVERAGE, lambda aside: trainer.save_model(str(aside), _internal_call=True))
    meet()
