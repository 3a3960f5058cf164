"""`learning_rate: auto`: before a head phase, a grid of heads trains at once on recorded activations; the best wins.

Heads that share their inputs cost one matrix product, as in DINOv2's linear evaluation
(https://hf.co/papers/2304.07193). Each is the head that the phase would train with its learning rate and weight decay:
the phase that is run with the choice ends with the head that won.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from hfft.errors import ModelError, RecipeError, TrainingError
from hfft.recipe.arguments import AUTO
from hfft.recipe.spec import PhaseSpec
from hfft.replay.dataset import ReplayedData
from hfft.runs.record import PhaseRecord
from hfft.system.distributed import on_main
from hfft.system.progress import bar
from hfft.training.losses import ImageLoss
from hfft.training.phase_data import PhaseData, PhaseRun

# About a factor of sqrt(10) apart, over the range that AdamW trains linear heads in.
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECAYS = (0.0, 0.1)

_BUDGET = 2**30  # bytes of weights, gradients and moments that train at once
_LEAST_SHRINKING = 0.05  # of the weights by their decay, over the phase

_LOG = get_logger(__name__)

Metric = Callable[[np.ndarray, np.ndarray], float]  # probabilities (M, K), labels (M,) or multi-label (M, K)


@dataclass(frozen=True)
class HeadInputs:
    """What the head sees.

    Attributes:
        train: Views of the training images, (N, D) each; epoch e trains on view e modulo their number.
        labels: Class indices, (N,), or shares of the classes, (N, K).
        validation: (M, D).
        validation_labels: (M,), or multi-label (M, K) of 0 and 1.
    """

    train: Sequence[torch.Tensor]
    labels: torch.Tensor
    validation: torch.Tensor
    validation_labels: torch.Tensor

    @property
    def is_multi_label(self) -> bool:
        """Whether each label is predicted by itself."""
        return self.validation_labels.ndim == 2


@dataclass(frozen=True)
class GridPoint:
    """How one head did: its best validation score, None without any or with outputs that are not finite, and when."""

    learning_rate: float
    weight_decay: float
    epoch: float
    score: float | None


@dataclass(frozen=True)
class HeadChoice(GridPoint):
    """The best head of the grid, and the whole grid in order."""

    table: tuple[GridPoint, ...]


def with_rate(
    model: Any, data: PhaseData, replayed: ReplayedData | None, arguments: TrainingArguments, phase: PhaseRun
) -> PhaseSpec:
    """The phase with numbers instead of `auto`, found once and kept in its folder (search.json).

    An error says why none can be found: the head is more than a layer, or nothing of it is recorded.
    """
    if phase.spec.arguments.get("learning_rate") != AUTO:
        return phase.spec
    if replayed is None:
        raise TrainingError(f"{phase.title}: learning_rate: auto needs what enters the head recorded; give a number")
    record = PhaseRecord(phase.folder)

    def choose() -> dict[str, Any]:
        if record.search:
            return record.search
        choice = search_head(
            _linear_head(model, replayed, phase.spec.name),
            _head_inputs(replayed),
            arguments=arguments,
            loss=data.loss(arguments.label_smoothing_factor),
            metrics=data.metrics,
            patience=phase.spec.early_stopping,
        )
        found = dataclasses.asdict(choice)
        record.write_search(found)
        return found

    choice = on_main(choose)
    rate, decay = choice["learning_rate"], choice["weight_decay"]
    _LOG.info(f"{phase.title}: learning rate {rate:g} and weight decay {decay:g}, the best of {len(choice['table'])}")
    chosen = {**phase.spec.arguments, "learning_rate": rate, "weight_decay": decay}
    return dataclasses.replace(phase.spec, arguments=chosen)


def _linear_head(model: Any, replayed: ReplayedData, phase: str) -> nn.Linear:
    path = replayed.split_point.path
    layer = model.get_submodule(path)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_whole = {id(parameter) for parameter in trainable} == {id(parameter) for parameter in layer.parameters()}
    is_fed_vectors = [tensor.ndim for tensor in replayed.train[0]["activations"]] == [1]
    if not (isinstance(layer, nn.Linear) and is_whole and is_fed_vectors):
        raise ModelError(
            f"phases.{phase}.learning_rate: auto needs a head that is one linear layer with nothing random in front "
            f"of it; here {len(trainable)} tensors train behind {path}, a {type(layer).__name__}; give a number"
        )
    return layer


def _head_inputs(replayed: ReplayedData) -> HeadInputs:
    train, validation = replayed.train, replayed.validation
    assert validation is not None  # `auto` without validation images is refused with the recipe
    *views, asked = (view.rows(range(len(view)))[0].float() for view in (*train.views, *validation.views))
    labels, validation_labels = (torch.from_numpy(np.asarray(part.labels)) for part in (train, validation))
    return HeadInputs(views, labels, asked, validation_labels)


def search_head(
    layer: nn.Linear,
    inputs: HeadInputs,
    *,
    arguments: TrainingArguments,
    loss: ImageLoss,
    metrics: Mapping[str, Metric],
    grid: Sequence[tuple[float, float]] | None = None,
    patience: int | None = None,
) -> HeadChoice:
    """Train a copy of the head for every point of the grid, and choose the best on validation images.

    Each copy goes through what PhaseTrainer would put it through, in float32 also where the phase has mixed
    precision: the same images in the same order, clipping by its own norm, optimizer, schedule and evaluations. Of
    equal scores, the smaller rate wins, then the larger decay. A head whose outputs are not finite at an evaluation
    would fail the phase, and can't win. The grid is trained in groups of heads that need a GiB at most.

    Args:
        layer: The head, with its start values; not changed.
        inputs: What it sees.
        arguments: Settings of the phase.
        loss: Of the phase.
        metrics: By the names that metric_for_best_model may have.
        grid: Learning rates and weight decays to try; `default_grid` when None.
        patience: Evaluations without improvement after which the phase would end; None is never.
    """
    _check(arguments, inputs)
    steps = PhaseSteps.of(arguments, len(inputs.labels))
    points = grid or default_grid(steps.total)
    metric = metrics[str(arguments.metric_for_best_model).removeprefix("eval_")]
    sign = 1 if arguments.greater_is_better else -1
    bytes_per_head = 16 * sum(value.numel() for value in layer.parameters())  # with gradient and two moments
    at_once = min(max(_BUDGET // bytes_per_head, 1), len(points))
    _LOG.info(
        f"learning_rate: auto tries {len(points)} heads, {at_once} at once in {at_once * bytes_per_head:,} bytes"
    )
    table: list[GridPoint] = []
    for start in range(0, len(points), at_once):
        heads = Heads(layer, points[start : start + at_once], steps)
        standings = [_Standing(sign, patience) for _ in heads.points]
        for step in train_heads(heads, inputs, steps, loss):
            if steps.evaluates_after(step):
                _evaluate(heads, standings, inputs, metric, step)
        table += [
            GridPoint(*point, epoch=steps.epoch(standing.step), score=standing.best)
            for point, standing in zip(heads.points, standings, strict=True)
        ]
    return _choose(table, sign)


def default_grid(steps: int) -> list[tuple[float, float]]:
    """Every one of RATES with every one of DECAYS that matters there.

    AdamW takes rate * decay of the weights away per step, so that a linear schedule of S steps shrinks them by
    1 - exp(-S * rate * decay / 2). A decay that shrinks them by less than 5 % gives the head that no decay gives, at
    the price of another.
    """
    return [
        (rate, decay)
        for rate in RATES
        for decay in DECAYS
        if decay == 0 or -math.expm1(-steps * rate * decay / 2) >= _LEAST_SHRINKING
    ]


@dataclass(frozen=True)
class PhaseSteps:
    """Steps, epochs and evaluations of a phase, as transformers.Trainer counts them."""

    arguments: TrainingArguments
    images: int
    used: int  # of the images, in an epoch
    images_per_step: int  # over all processes and accumulated batches; the last step of an epoch may have fewer
    per_epoch: int
    total: int

    @classmethod
    def of(cls, arguments: TrainingArguments, images: int) -> "PhaseSteps":
        """Count; that a batch is left was checked when the phase was planned."""
        batch = arguments.train_batch_size * arguments.world_size
        used = images // batch * batch if arguments.dataloader_drop_last else images
        per_step = batch * arguments.gradient_accumulation_steps
        per_epoch = math.ceil(used / per_step)
        total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
        return cls(arguments, images, used, per_step, per_epoch, total)

    def batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Epoch and image indices of every step, in the order of hfft.data.images.batches.EpochOrder."""
        for epoch in range(math.ceil(self.total / self.per_epoch)):
            generator = torch.Generator().manual_seed(self.arguments.seed + epoch)
            order = torch.randperm(self.images, generator=generator)[: self.used]
            for batch in order.split(self.images_per_step)[: self.total - epoch * self.per_epoch]:
                yield epoch, batch

    def epoch(self, step: int) -> float:
        """Epochs, with their fractions, after a number of steps; in batches, as the last step may have fewer."""
        epoch, steps = divmod(step, self.per_epoch)
        accumulation = self.arguments.gradient_accumulation_steps
        return epoch + steps * accumulation / math.ceil(self.used * accumulation / self.images_per_step)

    def evaluates_after(self, step: int) -> bool:
        """Whether the Trainer evaluates after a step, counted from 1."""
        is_last = step == self.total
        if self.arguments.eval_strategy == "epoch":
            return (is_last or step % self.per_epoch == 0) and self.epoch(step) >= self.arguments.eval_delay
        every = self.arguments.eval_steps or 1
        every = math.ceil(self.total * every) if every < 1 else every
        return (is_last or step % every == 0) and step >= self.arguments.eval_delay

    def learning_rates(self, rate: float) -> list[float]:
        """The learning rate of each step; RecipeError if that isn't known before or the highest rate is refused."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate)
        kind, options = SchedulerType(self.arguments.lr_scheduler_type), self.arguments.lr_scheduler_kwargs
        try:
            scheduler = get_scheduler(
                kind,
                optimizer=optimizer,
                num_warmup_steps=self.arguments.get_warmup_steps(self.total),
                num_training_steps=self.total,
                scheduler_specific_kwargs=options if isinstance(options, dict) else None,
            )
        except ValueError as error:
            raise RecipeError(f"learning_rate: auto can't try {rate:g}: {error}") from error
        if not isinstance(scheduler, LambdaLR):
            found = f"found lr_scheduler_type {kind.value}"
            raise RecipeError(f"learning_rate: auto needs a schedule that is known before; {found}; give a number")
        rates = []
        for _ in range(self.total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates


class Heads:
    """Copies of a linear layer that train at once, each with its own rate, decay and gradient norm."""

    def __init__(self, layer: nn.Linear, points: Sequence[tuple[float, float]], steps: PhaseSteps) -> None:
        """Copy the layer G times, once for each learning rate and weight decay."""
        schedules = {rate: steps.learning_rates(rate) for rate, _ in points}
        self._rates = [schedules[rate] for rate, _ in points]
        self.points = points
        self.weight = layer.weight.detach().float().repeat(len(points), 1, 1)  # (G, K, D)
        self.bias = None if layer.bias is None else layer.bias.detach().float().repeat(len(points), 1)  # (G, K)
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        self._gradients = [torch.zeros_like(tensor) for tensor in tensors]
        self._max_norm = steps.arguments.max_grad_norm
        groups = []
        for values, gradients, decays in zip(tensors, self._gradients, (True, False), strict=False):
            for value, gradient, (rate, decay) in zip(values, gradients, points, strict=True):
                parameter = nn.Parameter(value)  # shares memory with its slice
                parameter.grad = gradient
                groups.append({"params": [parameter], "lr": rate, "weight_decay": decay if decays else 0.0})
        kind, options = Trainer.get_optimizer_cls_and_kwargs(steps.arguments)
        self._optimizer = kind(groups, **options)

    def step(self, number: int, inputs: torch.Tensor, labels: torch.Tensor, loss: ImageLoss) -> None:
        """Take an optimizer step, counted from 1, with every head, on inputs (B, D) and labels (B,)."""
        heads = len(self.points)
        logits = (inputs @ self.weight.flatten(0, 1).T).unflatten(1, self.weight.shape[:2])  # (B, G, K)
        if self.bias is not None:
            logits += self.bias
        rows = logits.flatten(0, 1).requires_grad_()  # (B * G, K)
        # Heads share no parameter: the gradient of the sum of their losses holds the gradient of each.
        targets = labels.repeat_interleave(heads, dim=0)
        loss({"logits": rows}, targets, num_items_in_batch=labels.numel()).backward()
        slopes = rows.grad
        assert slopes is not None
        torch.mm(slopes.view(len(labels), -1).T, inputs, out=self._gradients[0].flatten(0, 1))
        for gradient in self._gradients[1:]:
            torch.sum(slopes.view_as(logits), dim=0, out=gradient)
        self._clip()
        for index, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._rates[index % heads][number - 1]
        self._optimizer.step()

    def logits(self, head: int, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of one head, (M, K), from inputs (M, D)."""
        return nn.functional.linear(inputs, self.weight[head], None if self.bias is None else self.bias[head])

    def _clip(self) -> None:
        """Scale each head's gradient as torch.nn.utils.clip_grad_norm_ does."""
        if self._max_norm <= 0:
            return
        norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in self._gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)  # (G,)
        scale = (self._max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in self._gradients:
            gradient *= scale.view(-1, *[1] * (gradient.ndim - 1))


def train_heads(heads: Heads, inputs: HeadInputs, steps: PhaseSteps, loss: ImageLoss) -> Iterator[int]:
    """Train heads for the steps of a phase; yields the number of each step, from 1, after it was taken."""
    device, shown = heads.weight.device, not steps.arguments.disable_tqdm
    batches = bar("learning rate", steps.total, steps.batches(), unit="steps", shown=shown)
    for step, (epoch, batch) in enumerate(batches, start=1):
        view = inputs.train[epoch % len(inputs.train)]
        features = view[batch.to(view.device)].to(device, torch.float32)  # (B, D)
        heads.step(step, features, inputs.labels[batch.to(inputs.labels.device)].to(device), loss)
        yield step


@dataclass
class _Standing:
    """What the Trainer would remember of a head."""

    sign: int
    patience: int | None
    best: float | None = None
    step: int = 0
    stale: int = 0
    has_ended: bool = False

    def take(self, score: float | None, step: int) -> None:
        """Take note of an evaluation; None where the phase would fail."""
        if score is None:
            self.best, self.step, self.has_ended = None, 0, True
            return
        is_better = self.best is None or self.sign * score > self.sign * self.best
        self.stale = 0 if is_better else self.stale + 1
        self.has_ended = self.patience is not None and self.stale >= self.patience
        if is_better:
            self.best, self.step = score, step


def _evaluate(heads: Heads, standings: list[_Standing], inputs: HeadInputs, metric: Metric, step: int) -> None:
    features = inputs.validation.to(heads.weight.device, torch.float32)  # (M, D)
    labels = inputs.validation_labels.cpu().numpy()
    for number, standing in enumerate(standings):
        if standing.has_ended:
            continue
        logits = heads.logits(number, features).cpu().double()
        probabilities = logits.sigmoid() if inputs.is_multi_label else logits.softmax(dim=1)
        standing.take(metric(probabilities.numpy(), labels) if logits.isfinite().all() else None, step)


def _check(arguments: TrainingArguments, inputs: HeadInputs) -> None:
    if arguments.eval_strategy == "no" or len(inputs.validation) == 0:
        raise RecipeError("learning_rate: auto chooses by validation images, and there are none; give a number")
    if arguments.greater_is_better is None:
        raise RecipeError("learning_rate: auto needs to know what is better: set metric_for_best_model")
    if arguments.optim not in ("adamw_torch", "adamw_torch_fused"):
        found, allowed = OptimizerNames(arguments.optim).value, "adamw_torch, adamw_torch_fused"
        raise RecipeError(f"learning_rate: auto found optim {found}; allowed: {allowed}; else give a number")


def _choose(table: Sequence[GridPoint], sign: int) -> HeadChoice:
    scores = {point: sign * point.score for point in table if point.score is not None}
    if not scores:
        raise TrainingError(
            "learning_rate: auto found no head to choose: none was evaluated with outputs that are finite numbers; "
            "look at the images' normalization and at eval_delay, or give a number"
        )
    best = max(scores, key=lambda point: (scores[point], -point.learning_rate, point.weight_decay))
    edges = {min(point.learning_rate for point in table), max(point.learning_rate for point in table)}
    equals = {point.learning_rate for point, score in scores.items() if score == scores[best]}
    if len(edges) > 1 and equals <= edges:
        side = "smallest" if best.learning_rate == min(edges) else "largest"
        chosen = f"{best.learning_rate:g}, the {side} of those tried"
        _LOG.warning(f"learning_rate: auto chose {chosen}; one beyond it may be better")
    return HeadChoice(best.learning_rate, best.weight_decay, best.epoch, best.score, tuple(table))
