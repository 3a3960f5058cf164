"""Metrics from class probabilities: plain functions, and the same as modules of `evaluate` that need no network.

Every metric takes probabilities (N, K), rows summing to 1, and labels (N,), and returns a float; `measure` has the
formulas, which work on counts so that intervals.py can apply them to many resamples at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from hfft.errors import TrainingError

MetricFunction = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Tally:
    """What the metrics are computed from: of one set of images, or of R resamples in a leading dimension.

    Attributes:
        images: Images of each class, (K,).
        hits: Right predictions of each class, (K,) or (R, K).
        predicted: Predictions of each class, (K,) or (R, K).
        loss: Mean negative log probability of the label in nats, () or (R,).
    """

    images: np.ndarray
    hits: np.ndarray
    predicted: np.ndarray
    loss: np.ndarray


def tally(probabilities: np.ndarray, labels: np.ndarray) -> Tally:
    """Count one set of images."""
    classes, predicted = probabilities.shape[1], probabilities.argmax(axis=1)
    return Tally(
        images=np.bincount(labels, minlength=classes),
        hits=np.bincount(labels[predicted == labels], minlength=classes),
        predicted=np.bincount(predicted, minlength=classes),
        loss=losses(probabilities, labels).mean(),
    )


def measure(counts: Tally) -> dict[str, np.ndarray]:
    """Every metric, () or (R,)."""
    present = counts.images > 0
    f1 = 2 * counts.hits / np.maximum(counts.images + counts.predicted, 1)  # (..., K)
    return {
        "accuracy": counts.hits.sum(axis=-1) / counts.images.sum(),
        "balanced_accuracy": np.mean(counts.hits[..., present] / counts.images[present], axis=-1),
        "macro_f1": np.mean(f1, axis=-1),
        "log_loss": counts.loss,
    }


def losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log probability of each image's label in nats, (N,) float64; at most 87.3, that of float32's least."""
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose most probable class is the label."""
    return float(measure(tally(probabilities, labels))["accuracy"])


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall of the classes that occur among the labels."""
    return float(measure(tally(probabilities, labels))["balanced_accuracy"])


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of all K classes; a class neither seen nor predicted counts as 0, as in scikit-learn."""
    return float(measure(tally(probabilities, labels))["macro_f1"])


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability of the label, in nats."""
    return float(measure(tally(probabilities, labels))["log_loss"])


METRICS: dict[str, MetricFunction] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}


class ProbabilityMetric(evaluate.Metric):
    """One of METRICS as an `evaluate` module: predictions are rows of probabilities, references class indices."""

    def __init__(self, name: str) -> None:
        """Choose the metric, a key of METRICS; what is added to the module stays in memory."""
        self._metric = name
        super().__init__(config_name=name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=METRICS[self._metric].__doc__ or "",
            citation="",
            inputs_description="predictions: (N, K) probabilities; references: (N,) class indices",
            features=Features({"predictions": Sequence(Value("float32")), "references": Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {self._metric: METRICS[self._metric](np.asarray(predictions), np.asarray(references))}


def trainer_metrics() -> Callable[[Any], dict[str, float]]:
    """All METRICS as `compute_metrics` of transformers.Trainer, which hands over the gathered logits of a split."""
    modules = [ProbabilityMetric(name) for name in METRICS]

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids  # (N, K), (N,)
        if not np.isfinite(logits).all():
            raise TrainingError(
                "the network's outputs are no finite numbers any more; lower the learning rate, or train in bf16 or "
                "float32 instead of fp16"
            )
        probabilities = softmax(logits)
        results: dict[str, float] = {}
        for module in modules:
            results |= module.compute(predictions=probabilities, references=labels) or {}
        return results

    return compute


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K) in float32."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
