"""Metrics from class probabilities, as plain functions; modules.py makes modules of `evaluate` of them.

Every metric takes probabilities (N, K), rows summing to 1, and labels (N,), and returns a float; `measure` has the
formulas, which work on counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MetricFunction = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Tally:
    """What the metrics are computed from.

    Attributes:
        images: Images of each class, (K,).
        hits: Right predictions of each class, (K,).
        predicted: Predictions of each class, (K,).
        loss: Mean negative log probability of the label, in nats.
    """

    images: np.ndarray
    hits: np.ndarray
    predicted: np.ndarray
    loss: float


def tally(probabilities: np.ndarray, labels: np.ndarray) -> Tally:
    """Count one set of images."""
    return tally_of(probabilities.argmax(axis=1), _of(probabilities, labels), labels, probabilities.shape[1])


def tally_of(predicted: np.ndarray, chosen: np.ndarray, labels: np.ndarray, classes: int) -> Tally:
    """Count one set of images, by their most probable class, (N,), and the probability of their label, (N,)."""
    return Tally(
        images=np.bincount(labels, minlength=classes),
        hits=np.bincount(labels[predicted == labels], minlength=classes),
        predicted=np.bincount(predicted, minlength=classes),
        loss=float(_negative_log(chosen).mean()),
    )


def measure(counts: Tally) -> dict[str, float]:
    """Every metric."""
    present = counts.images > 0
    f1 = 2 * counts.hits / np.maximum(counts.images + counts.predicted, 1)  # (K,)
    return {
        "accuracy": float(counts.hits.sum() / counts.images.sum()),
        "balanced_accuracy": float(np.mean(counts.hits[present] / counts.images[present])),
        "macro_f1": float(np.mean(f1)),
        "log_loss": counts.loss,
    }


def losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log probability of each image's label in nats, (N,) float64; at most 87.3, that of float32's least."""
    return _negative_log(_of(probabilities, labels))


def _of(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return probabilities[np.arange(len(labels)), labels]


def _negative_log(chosen: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(chosen.astype(np.float64), np.finfo(np.float32).tiny))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose most probable class is the label."""
    return measure(tally(probabilities, labels))["accuracy"]


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall of the classes that occur among the labels."""
    return measure(tally(probabilities, labels))["balanced_accuracy"]


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of all K classes; a class neither seen nor predicted counts as 0, as in scikit-learn."""
    return measure(tally(probabilities, labels))["macro_f1"]


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability of the label, in nats."""
    return measure(tally(probabilities, labels))["log_loss"]


METRICS: dict[str, MetricFunction] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K) in float32."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
