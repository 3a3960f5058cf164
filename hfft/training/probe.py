"""The many-head probe: before a head phase, train a grid of heads at once on stored head inputs and choose one.

Heads that share their inputs cost one matrix product, as in DINOv2's linear evaluation
(https://hf.co/papers/2304.07193). Each is the head that the phase would train with its learning rate and weight decay,
so that a phase that is run with the choice ends with the head that won.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from hfft.errors import ModelError, RecipeError, TrainingError
from hfft.system.progress import bar
from hfft.training.losses import ImageLoss

# About a factor of sqrt(10) apart, over the range that AdamW trains linear heads in.
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECAYS = (0.0, 0.1)

_BUDGET = 2**30  # bytes of weights, gradients and moments that train at once
_LEAST_SHRINKING = 0.05  # of the weights by their decay, over the phase

_LOG = get_logger(__name__)

Metric = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class HeadInputs:
    """What the head sees, with everything behind it computed once.

    Attributes:
        train: Views of the N training images, one (N, D) float tensor each; epoch e trains on view e modulo their
            number.
        labels: Class indices of the training images, (N,).
        validation: (M, D).
        validation_labels: (M,).
        is_multi_label: Whether labels are (N, K) and (M, K) of 0 and 1, each predicted by itself.
    """

    train: Sequence[torch.Tensor]
    labels: torch.Tensor
    validation: torch.Tensor
    validation_labels: torch.Tensor
    is_multi_label: bool = False


@dataclass(frozen=True)
class GridPoint:
    """How one head did.

    Attributes:
        learning_rate: Highest rate of its schedule.
        weight_decay: Of its weights; its biases have none.
        epoch: When it was best.
        score: Its best validation score; None if its outputs were no finite numbers, or it was never evaluated.
    """

    learning_rate: float
    weight_decay: float
    epoch: float
    score: float | None


@dataclass(frozen=True)
class HeadChoice(GridPoint):
    """The best head of the grid.

    Attributes:
        table: All heads, in the order of the grid.
    """

    table: tuple[GridPoint, ...]


def search_head(
    layer: nn.Module,
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
        inputs: Of the head.
        arguments: Settings of the phase; their learning_rate and weight_decay are not used.
        loss: Of the phase.
        metrics: By the names that metric_for_best_model may have, from probabilities (M, K) and labels (M,).
        grid: Learning rates and weight decays to try; `default_grid` when None.
        patience: Evaluations without improvement after which the phase would end; None is never.

    Returns:
        The same on every process that is given the same.

    Raises:
        ModelError: If the head isn't one linear layer.
        RecipeError: If there is nothing to choose by, or the phase has an optimizer or a schedule that can't be
            tried.
        TrainingError: If no head can be chosen.
    """
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"learning_rate: auto needs a head that is one linear layer; found {type(layer).__name__}; give a number"
        )
    _check(arguments, inputs)
    course = Course.of(arguments, len(inputs.labels))
    points = grid or default_grid(course.steps)
    metric = metrics[str(arguments.metric_for_best_model).removeprefix("eval_")]
    bytes_per_head = 16 * sum(value.numel() for value in layer.parameters())  # with gradient and two moments
    at_once = min(max(_BUDGET // bytes_per_head, 1), len(points))
    _LOG.info(
        f"learning_rate: auto tries {len(points)} heads, {at_once} at once in {at_once * bytes_per_head:,} bytes"
    )
    table: list[GridPoint] = []
    for start in range(0, len(points), at_once):
        heads = Heads(layer, points[start : start + at_once], course)
        standings = [_Standing(bool(arguments.greater_is_better), patience) for _ in range(len(heads))]
        for step in train_heads(heads, inputs, course, loss):
            if course.evaluates(step):
                _evaluate(heads, standings, inputs, metric, step)
        table += [
            GridPoint(*point, epoch=course.epoch(standing.step), score=standing.best)
            for point, standing in zip(heads.points, standings, strict=True)
        ]
    return _choose(table, bool(arguments.greater_is_better))


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


def learning_rates(arguments: TrainingArguments, rate: float, steps: int) -> list[float]:
    """The learning rate of each step, as the phase's schedule has it for a highest rate.

    Raises:
        RecipeError: If the schedule depends on how the training goes, or refuses the rate.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate)
    kind, options = SchedulerType(arguments.lr_scheduler_type), arguments.lr_scheduler_kwargs
    try:
        scheduler = get_scheduler(
            kind,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options if isinstance(options, dict) else None,
        )
    except ValueError as error:
        raise RecipeError(f"learning_rate: auto can't try {rate:g}: {error}") from error
    if not isinstance(scheduler, LambdaLR):
        raise RecipeError(
            f"learning_rate: auto needs a schedule that is known before; found lr_scheduler_type {kind.value}; give a "
            "number"
        )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@dataclass(frozen=True)
class Course:
    """Steps, epochs and evaluations of a phase, as transformers.Trainer counts them.

    Attributes:
        arguments: Settings of the phase.
        images: Training images.
        used: Images of an epoch that train.
        images_per_step: Over all processes and accumulated batches; the last step of an epoch may have fewer.
        per_epoch: Steps per epoch.
        steps: Steps in all.
    """

    arguments: TrainingArguments
    images: int
    used: int
    images_per_step: int
    per_epoch: int
    steps: int

    @classmethod
    def of(cls, arguments: TrainingArguments, images: int) -> "Course":
        """Count.

        Raises:
            RecipeError: If no batch is left.
        """
        batch = arguments.train_batch_size * arguments.world_size
        used = images // batch * batch if arguments.dataloader_drop_last else images
        if used == 0:
            raise RecipeError(
                f"a batch of {batch} is larger than the {images} training images, and dataloader_drop_last leaves it "
                "out"
            )
        per_step = batch * arguments.gradient_accumulation_steps
        per_epoch = math.ceil(used / per_step)
        steps = arguments.max_steps
        if steps <= 0:
            steps = math.ceil(arguments.num_train_epochs * per_epoch)
        return cls(arguments, images, used, per_step, per_epoch, steps)

    def batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Epoch and image indices of every step, in the order of hfft.data.images.batches.EpochOrder."""
        for epoch in range(math.ceil(self.steps / self.per_epoch)):
            generator = torch.Generator().manual_seed(self.arguments.seed + epoch)
            order = torch.randperm(self.images, generator=generator)[: self.used]
            for batch in order.split(self.images_per_step)[: self.steps - epoch * self.per_epoch]:
                yield epoch, batch

    def epoch(self, step: int) -> float:
        """Epochs, with their fractions, after a number of steps; in batches, as the last step may have fewer."""
        epoch, steps = divmod(step, self.per_epoch)
        accumulation = self.arguments.gradient_accumulation_steps
        return epoch + steps * accumulation / math.ceil(self.used * accumulation / self.images_per_step)

    def evaluates(self, step: int) -> bool:
        """Whether the Trainer evaluates after a step, counted from 1."""
        is_last = step == self.steps
        if self.arguments.eval_strategy == "epoch":
            return (is_last or step % self.per_epoch == 0) and self.epoch(step) >= self.arguments.eval_delay
        every = self.arguments.eval_steps or 1
        every = math.ceil(self.steps * every) if every < 1 else every
        return (is_last or step % every == 0) and step >= self.arguments.eval_delay


class Heads:
    """Copies of a linear layer that train at once, each with its own rate, decay and gradient norm."""

    def __init__(self, layer: nn.Linear, points: Sequence[tuple[float, float]], course: Course) -> None:
        """Copy the layer.

        Args:
            layer: Gives the start values.
            points: Learning rate and weight decay of each of the G copies.
            course: Of the phase.
        """
        arguments = course.arguments
        schedules = {rate: learning_rates(arguments, rate, course.steps) for rate, _ in points}
        self._rates = [schedules[rate] for rate, _ in points]
        self.points = points
        self.weight = layer.weight.detach().float().repeat(len(points), 1, 1)  # (G, K, D)
        self.bias = None if layer.bias is None else layer.bias.detach().float().repeat(len(points), 1)  # (G, K)
        self._values = [self.weight] if self.bias is None else [self.weight, self.bias]
        self._gradients = [torch.zeros_like(value) for value in self._values]
        self._max_norm = arguments.max_grad_norm
        groups = []
        for values, gradients, decays in zip(self._values, self._gradients, (True, False), strict=False):
            for value, gradient, (rate, decay) in zip(values, gradients, points, strict=True):
                parameter = nn.Parameter(value)  # shares memory with its slice
                parameter.grad = gradient
                groups.append({"params": [parameter], "lr": rate, "weight_decay": decay if decays else 0.0})
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        self._optimizer = kind(groups, **options)

    def __len__(self) -> int:
        """Number of heads G."""
        return len(self.points)

    def take(self, step: int, inputs: torch.Tensor, labels: torch.Tensor, loss: ImageLoss) -> None:
        """Take an optimizer step, counted from 1, with every head, on inputs (B, D) and labels (B,)."""
        logits = (inputs @ self.weight.flatten(0, 1).T).unflatten(1, self.weight.shape[:2])  # (B, G, K)
        if self.bias is not None:
            logits += self.bias
        rows = logits.flatten(0, 1).requires_grad_()  # (B * G, K)
        # Heads share no parameter: the gradient of the sum of their losses holds the gradient of each.
        targets = labels.repeat_interleave(len(self), dim=0)
        loss({"logits": rows}, targets, num_items_in_batch=labels.numel()).backward()
        slopes = rows.grad
        assert slopes is not None
        torch.mm(slopes.view(len(labels), -1).T, inputs, out=self._gradients[0].flatten(0, 1))
        for gradient in self._gradients[1:]:
            torch.sum(slopes.view_as(logits), dim=0, out=gradient)
        self._clip()
        for number, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._rates[number % len(self)][step - 1]
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


def train_heads(heads: Heads, inputs: HeadInputs, course: Course, loss: ImageLoss) -> Iterator[int]:
    """Train heads for the steps of a phase; yields the number of each step, from 1, after it was taken."""
    device, arguments = heads.weight.device, course.arguments
    batches = bar("learning rate", course.steps, course.batches(), unit="steps", shown=not arguments.disable_tqdm)
    for step, (epoch, batch) in enumerate(batches, start=1):
        view = inputs.train[epoch % len(inputs.train)]
        features = view[batch.to(view.device)].to(device, torch.float32)  # (B, D)
        labels = inputs.labels[batch.to(inputs.labels.device)].to(device)  # (B,)
        heads.take(step, features, labels, loss)
        yield step


@dataclass
class _Standing:
    """What the Trainer would remember of a head."""

    greater_is_better: bool
    patience: int | None
    best: float | None = None
    step: int = 0
    stale: int = 0
    has_failed: bool = False

    @property
    def has_ended(self) -> bool:
        return self.has_failed or (self.patience is not None and self.stale >= self.patience)

    def take(self, score: float, step: int) -> None:
        is_better = self.best is None or (score > self.best if self.greater_is_better else score < self.best)
        self.stale = 0 if is_better else self.stale + 1
        if is_better:
            self.best, self.step = score, step


def _evaluate(heads: Heads, standings: list[_Standing], inputs: HeadInputs, metric: Metric, step: int) -> None:
    features = inputs.validation.to(heads.weight.device, torch.float32)  # (M, D)
    labels = inputs.validation_labels.cpu().numpy()
    for number, standing in enumerate(standings):
        if standing.has_ended:
            continue
        logits = heads.logits(number, features)
        if not logits.isfinite().all():
            standing.best, standing.step, standing.has_failed = None, 0, True
            continue
        values = logits.cpu().double()
        shares = values.sigmoid() if inputs.is_multi_label else values.softmax(dim=1)
        standing.take(metric(shares.numpy(), labels), step)  # (M, K) float64


def _check(arguments: TrainingArguments, inputs: HeadInputs) -> None:
    if arguments.eval_strategy == "no" or len(inputs.validation) == 0:
        raise RecipeError("learning_rate: auto chooses by validation images, and there are none; give a number")
    if arguments.greater_is_better is None:
        raise RecipeError("learning_rate: auto needs to know what is better: set metric_for_best_model")
    if arguments.optim not in ("adamw_torch", "adamw_torch_fused"):
        found, allowed = OptimizerNames(arguments.optim).value, "adamw_torch, adamw_torch_fused"
        raise RecipeError(f"learning_rate: auto found optim {found}; allowed: {allowed}; else give a number")


def _choose(table: Sequence[GridPoint], greater_is_better: bool) -> HeadChoice:
    sign = 1 if greater_is_better else -1
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
        _LOG.warning(
            f"learning_rate: auto chose {best.learning_rate:g}, the {side} of those tried; one beyond it may be better"
        )
    return HeadChoice(best.learning_rate, best.weight_decay, best.epoch, best.score, tuple(table))
