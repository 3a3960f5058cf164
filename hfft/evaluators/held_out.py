"""One pass over the held-out images: scores of the result, and what else is computed from the same images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import Transform
from hfft.data.sources.labels import is_multi_label, label_array
from hfft.metrics.probabilities import sigmoid, softmax
from hfft.metrics.scores import Scores, measured
from hfft.metrics.scoring import Logits, Run, compute, divided
from hfft.metrics.thresholds import choose_thresholds

Then = Callable[..., Sequence[torch.Tensor]]
"""Tensors that a network returns for a batch, each (B, ...), to others."""


@dataclass(frozen=True)
class ForwardPass:
    """How images are passed through networks.

    Attributes:
        transform: The evaluation transform.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
        choose_run: As for `compute`.
    """

    transform: Transform
    batch_size: int
    workers: int
    choose_run: Callable[[nn.Module, torch.Tensor], Run] | None = None

    def over(
        self, splits: Mapping[str, Dataset], network: nn.Module, then: Then | None = None
    ) -> list[dict[str, np.ndarray]]:
        """For each tensor of `compute` its values (N, ...) by split."""
        examples = Examples(concatenate_datasets(list(splits.values())), self.transform.pixels)
        found = compute(
            network,
            examples,
            self.transform.floats,
            batch_size=self.batch_size,
            workers=self.workers,
            choose_run=self.choose_run,
            then=then,
        )
        return [divided(array, splits) for array in found]

    def first_pixels(self, rows: Dataset, device: torch.device) -> torch.Tensor:
        """The first image, (1, C, H, W)."""
        return self.transform.floats(Examples(rows, self.transform.pixels)[0]["pixel_values"][None].to(device))


@dataclass(frozen=True)
class JointPass:
    """What is computed in the pass that scores a result.

    Attributes:
        network: Pixels to a flat tuple of tensors.
        then: Makes the result's logits of these, followed by other tensors.
        take: Gets the values of the other tensors by split.
    """

    network: nn.Module
    then: Then
    take: Callable[[list[dict[str, np.ndarray]]], None]


def score_held_out(
    model: Any,
    splits: Mapping[str, Dataset],
    forward: ForwardPass,
    joint: JointPass | None,
    *,
    classes: Sequence[str],
) -> dict[str, Scores]:
    """Score a result, and compute in the same pass what an evaluator asked for; the same on every process."""
    if not splits:
        return {}
    if joint is None:
        (logits,) = forward.over(splits, Logits(model))
    else:
        logits, *others = forward.over(splits, joint.network, joint.then)
        joint.take(others)
    return measure_logits(logits, splits, classes)


def measure_logits(
    logits: Mapping[str, np.ndarray], splits: Mapping[str, Dataset], classes: Sequence[str]
) -> dict[str, Scores]:
    """Scores by split of logits (N, K)."""
    several = is_multi_label(next(iter(splits.values())))
    values = logits if several else {split: softmax(part) for split, part in logits.items()}
    return measure_splits(values, splits, classes)


def measure_splits(
    values: Mapping[str, np.ndarray], splits: Mapping[str, Dataset], classes: Sequence[str]
) -> dict[str, Scores]:
    """Scores by split of probabilities (N, K), or multi-label of logits.

    The thresholds of labels are those that are best on the validation images.
    """
    thresholds = None
    if "validation" in values and is_multi_label(splits["validation"]):
        thresholds = choose_thresholds(sigmoid(values["validation"]), label_array(splits["validation"]))
    return {split: measured(part, splits[split], classes, thresholds) for split, part in values.items()}
