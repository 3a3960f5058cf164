"""Metrics from class probabilities: plain functions, and the same as modules of `evaluate` that need no network.

Every function takes probabilities (N, K), rows summing to 1, and labels (N,), and returns a float.
"""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from hfft.errors import TrainingError

MetricFunction = Callable[[np.ndarray, np.ndarray], float]


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose most probable class is the label."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall of the classes that occur among the labels."""
    hits, occurring, _ = _counts(probabilities, labels)
    present = occurring > 0
    return float(np.mean(hits[present] / occurring[present]))


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of all K classes; a class neither seen nor predicted counts as 0, as in scikit-learn."""
    hits, occurring, predicted = _counts(probabilities, labels)
    return float(np.mean(2 * hits / np.maximum(occurring + predicted, 1)))


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability of the label, in nats."""
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.mean(np.log(np.maximum(chosen, np.finfo(np.float32).tiny))))


METRICS: dict[str, MetricFunction] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}


class ProbabilityMetric(evaluate.Metric):
    """One of METRICS as an `evaluate` module: predictions are rows of probabilities, references class indices."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        """Choose the metric.

        Args:
            name: A key of METRICS.
            **kwargs: As evaluate.Metric takes them, for example `num_process`.
        """
        self._metric = name
        super().__init__(config_name=name, keep_in_memory=kwargs.pop("keep_in_memory", True), **kwargs)

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


def _counts(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class: right predictions, labels, predictions; each (K,)."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return hits, np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
