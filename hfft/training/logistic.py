"""Logistic regression: the linear head at the minimum of its loss, for a path of weight decays."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger

from hfft.system.progress import SOON, bar
from hfft.training.losses import ImageLoss

_MOST_STEPS = 1000  # of L-BFGS, for a weight decay
ROUGH_STEPS = 40
"""Steps of L-BFGS that are enough to rank labels by."""
_MOST_DOUBLES = 2**25  # features of all images; more are computed with in float32
_LOGITS_AT_ONCE = 2**24
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-5}  # of the largest slope, where losses are of order 1
_CONSTANT = 1e-6  # of a feature's size, less deviation than which is rounding

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class LinearHead:
    """A linear head, the weight decay whose loss it minimises, and how far the solver came.

    Attributes:
        weight: (K, D).
        bias: (K,).
        steps: Of L-BFGS.
        slope: Largest entry of the gradient that is left.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    weight_decay: float
    steps: int
    slope: float

    def cpu(self) -> "LinearHead":
        """The same head in main memory."""
        return dataclasses.replace(self, weight=self.weight.cpu(), bias=self.bias.cpu())

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of inputs (N, D)."""
        return inputs.to(self.weight) @ self.weight.T + self.bias


def head_path(
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    classes: int,
    weight_decays: Sequence[float],
    loss: ImageLoss | None = None,
    most_steps: int | None = None,
) -> Iterator[LinearHead]:
    """The linear head of least loss for each weight decay, each from the one before, when it is asked for.

    Minimised is the mean of the images' losses plus `weight_decay / 2` times the squares of the weights, as they are
    for features with mean 0 and deviation 1; the bias has no penalty. The problem is convex: for a weight decay above
    0 there is one answer. By L-BFGS with a strong Wolfe line search, in float64 unless the inputs are large, on the
    device of the inputs; no random number is drawn.

    Args:
        inputs: (N, D).
        labels: Class indices (N,), or shares of the classes (N, K) whose sum is the image's weight; for LabelSetLoss,
            (N, K) from 0 to 1.
        classes: K.
        weight_decays: The strongest first, so that each head is near the one before.
        loss: Of the phase, a convex one; cross entropy when None.
        most_steps: Of L-BFGS for each weight decay: a rough answer, in float32; to its end when None.

    Yields:
        Heads for the inputs as they are, in the order of the weight decays.
    """
    loss = ImageLoss() if loss is None else loss
    is_exact = most_steps is None and inputs.numel() <= _MOST_DOUBLES
    dtype = torch.float64 if is_exact else torch.float32
    labels = labels.to(inputs.device, dtype if labels.is_floating_point() else torch.int64)
    mean = inputs.mean(dim=0, dtype=torch.float64)  # (D,)
    deviation = inputs.std(dim=0, correction=0).double()
    varies = deviation > _CONSTANT * (mean.square() + deviation.square()).sqrt()
    scale = torch.where(varies, 1 / deviation, 0.0)
    scaled = ((inputs - mean) * scale).to(dtype)  # (N, D)
    weight = torch.zeros(classes, inputs.shape[1], dtype=dtype, device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=dtype, device=inputs.device, requires_grad=True)
    for decay in weight_decays:
        steps, slope = _minimise(weight, bias, scaled, labels, loss, decay, most_steps or _MOST_STEPS)
        raw = weight.detach().double() * scale
        offset = bias.detach().double() - raw @ mean
        yield LinearHead(raw.to(dtype), offset.to(dtype), decay, steps, slope)


def held_out_logits(
    views: Sequence[torch.Tensor],
    labels: torch.Tensor,
    folds: torch.Tensor,
    solve: Callable[[torch.Tensor, torch.Tensor], Iterable[LinearHead]],
) -> torch.Tensor:
    """Logits of each image by the heads of the other folds, (W, N, K) float64 in main memory, by weight decay.

    Args:
        views: (N, D) each; heads learn from all of them, and are asked about the first.
        labels: Of the images, (N,) or (N, K).
        folds: Number of the fold that an image and its views are in, (N,).
        solve: `head_path` with its options.
    """
    parts, order = [], []
    for fold in bar("linear heads", None, folds.unique().tolist(), unit="folds", delay=SOON):
        known = (folds != fold).to(labels.device)
        inputs, own = torch.cat([view[known] for view in views]), torch.cat([labels[known]] * len(views))
        parts.append(torch.stack([head.logits(views[0][~known]).cpu().double() for head in solve(inputs, own)]))
        order.append((folds == fold).nonzero().flatten())
    return torch.cat(parts, dim=1)[:, torch.cat(order).argsort()]


def _minimise(
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    loss: ImageLoss,
    decay: float,
    most_steps: int,
) -> tuple[int, float]:
    """Change weight and bias to those of least loss; returns the steps and the largest slope that is left."""
    tolerance, smallest = _TOLERANCES[inputs.dtype], torch.finfo(inputs.dtype).eps
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=most_steps,
        max_eval=2 * most_steps,
        tolerance_grad=tolerance,
        tolerance_change=smallest,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, _LOGITS_AT_ONCE // len(bias))

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = decay / 2 * weight.square().sum()
        total.backward()
        for some, own in zip(inputs.split(rows), labels.split(rows), strict=True):
            part = loss({"logits": some @ weight.T + bias}, own, labels.numel())
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(objective)
    objective()
    slope = max(float(tensor.grad.abs().max()) for tensor in (weight, bias) if tensor.grad is not None)
    steps = int(optimizer.state[weight]["n_iter"])
    if steps >= _MOST_STEPS:  # a rough answer may stop before
        _LOG.warning(f"logistic regression: weight decay {decay:g}: not at its end after {steps} steps")
    return steps, slope
