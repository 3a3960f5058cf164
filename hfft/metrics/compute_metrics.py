"""What the Trainer measures of the validation images while a phase trains, without keeping a logit of each class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfft.errors import TrainingError
from hfft.metrics.metrics import measure, tally_of
from hfft.metrics.multilabel import SetOutcomes

Reduce = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Validating:
    """Two functions that transformers.Trainer takes.

    Attributes:
        reduce: `preprocess_logits_for_metrics`: what is kept of the logits (B, K) of a batch.
        compute: `compute_metrics`: every metric, from what was kept of all images.
    """

    reduce: Reduce
    compute: Callable[[Any], dict[str, float]]


def validating(classes: int, *, is_multi_label: bool = False) -> Validating:
    """All METRICS from two numbers per image, or SET_METRICS, which rank the images of a label, from all of them.

    Args:
        classes: How many there are.
        is_multi_label: Whether an image has any number of labels.
    """
    if is_multi_label:
        return Validating(_logits, _compute_sets)
    return Validating(_answers, lambda prediction: _compute(prediction, classes))


def _answers(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most probable class and the probability of the label, (B, 2) float32; NaN where logits aren't finite."""
    scores = _logits(logits, labels).float()  # (B, K)
    probabilities = scores.softmax(dim=1)
    chosen = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    chosen = chosen.where(scores.isfinite().all(dim=1), torch.nan)
    return torch.stack([probabilities.argmax(dim=1).float(), chosen], dim=1)


def _logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _compute(prediction: Any, classes: int) -> dict[str, float]:
    answers, labels = prediction.predictions, prediction.label_ids  # (N, 2), (N,)
    _check(answers)
    return measure(tally_of(answers[:, 0].astype(np.int64), answers[:, 1], labels, classes))


def _compute_sets(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids  # (N, K), (N, K)
    _check(logits)
    return SetOutcomes.of_logits(logits, labels).metrics


def _check(numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise TrainingError(
            "the network's outputs are no finite numbers any more; lower the learning rate, or train in bf16 or "
            "float32 instead of fp16"
        )
