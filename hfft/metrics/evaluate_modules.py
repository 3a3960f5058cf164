"""The metrics as modules of `evaluate` that need no network: what a run measures with, and each one alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value

from hfft.errors import TrainingError
from hfft.metrics.metrics import DETAILS, METRICS, TABLES, measure, tally_of
from hfft.metrics.multilabel import LABEL_DETAILS, LABEL_METRICS, LabelOutcomes
from hfft.metrics.probabilities import image_losses, logs, sigmoid

MODULES = {**METRICS, **DETAILS, **TABLES}
MULTI_LABEL_MODULES = {**LABEL_METRICS, **LABEL_DETAILS}


class _InMemory(evaluate.Metric):
    def __init__(self, name: str) -> None:
        super().__init__(config_name=name, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""  # no folder in the user's cache, as nothing is written


class ProbabilityMetric(_InMemory):
    """One of MODULES as an `evaluate` module: predictions are rows of probabilities, references class indices.

    Of MULTI_LABEL_MODULES, for images with any number of labels, references are rows of 0 and 1.
    """

    def __init__(self, name: str, *, is_multi_label: bool = False) -> None:
        """Choose the metric, a key of MODULES or of MULTI_LABEL_MODULES."""
        self._metric = name
        self._is_multi_label = is_multi_label
        self._compute_metric = (MULTI_LABEL_MODULES if is_multi_label else MODULES)[name]
        super().__init__(name)

    def _info(self) -> evaluate.MetricInfo:
        references = Sequence(Value("int64")) if self._is_multi_label else Value("int64")
        shape = "(N, K) of 0 and 1" if self._is_multi_label else "(N,) class indices"
        return evaluate.MetricInfo(
            description=self._metric.replace("_", " "),
            citation="",
            inputs_description=f"predictions: (N, K) probabilities; references: {shape}",
            features=Features({"predictions": Sequence(Value("float32")), "references": references}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {self._metric: self._compute_metric(np.asarray(predictions), np.asarray(references))}


class HeadlineMetrics(_InMemory):
    """All METRICS from two numbers per image: its most probable class, and the loss of its label.

    Predictions and references are class indices, (N,); `losses` are negative log probabilities in nats, (N,).
    """

    def __init__(self, classes: int) -> None:
        """Choose the number of classes."""
        self._classes = classes
        super().__init__("headline")

    def _info(self) -> evaluate.MetricInfo:
        numbers = {"predictions": Value("int64"), "losses": Value("float64"), "references": Value("int64")}
        return evaluate.MetricInfo(
            description=", ".join(METRICS).replace("_", " "),
            citation="",
            inputs_description="predictions, references: (N,) class indices; losses: (N,) in nats",
            features=Features(numbers),
        )

    def _compute(self, predictions: Any, losses: Any, references: Any) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return measure(tally_of(np.asarray(predictions), np.asarray(losses), np.asarray(references), self._classes))


class LabelHeadlineMetrics(_InMemory):
    """All LABEL_METRICS: predictions are logits (N, K), references rows of 0 and 1.

    `thresholds` are the probabilities from which labels are given, (K,); 0.5 for all when None.
    """

    def __init__(self) -> None:
        """Nothing is to be chosen."""
        super().__init__("label_headline")

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=", ".join(LABEL_METRICS).replace("_", " "),
            citation="",
            inputs_description="predictions: (N, K) logits; references: (N, K) of 0 and 1",
            features=Features({"predictions": Sequence(Value("float64")), "references": Sequence(Value("int64"))}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: Any, references: Any, thresholds: np.ndarray | None = None
    ) -> dict[str, float]:
        logits, labels = np.asarray(predictions), np.asarray(references)
        given = None if thresholds is None else sigmoid(logits) >= thresholds
        return LabelOutcomes.of_logits(logits, labels, given).metrics


def headline_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """METRICS of probabilities (N, K) and labels (N,), by their module."""
    module = HeadlineMetrics(probabilities.shape[1])
    losses, best = image_losses(probabilities, labels), probabilities.argmax(axis=1)
    return _known(module.compute(predictions=best, losses=losses, references=labels))


def label_headline_metrics(
    logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | None = None
) -> dict[str, Any]:
    """LABEL_METRICS of logits (N, K) and labels (N, K), by their module."""
    found = LabelHeadlineMetrics().compute(
        predictions=logits.astype(np.float64), references=(labels > 0).astype(np.int64), thresholds=thresholds
    )
    return _known(found)


def _known(found: dict[str, Any] | None) -> dict[str, Any]:
    assert found is not None  # which other processes of a launch get, where they share one module
    return found


@dataclass(frozen=True)
class Validating:
    """Two functions that transformers.Trainer takes.

    Attributes:
        reduce: `preprocess_logits_for_metrics`: what is kept of the logits (B, K) of a batch.
        compute: `compute_metrics`: every headline metric, from what was kept of all images.
    """

    reduce: Callable[[Any, torch.Tensor], torch.Tensor]
    compute: Callable[[Any], dict[str, float]]


def validating(classes: int, *, is_multi_label: bool = False) -> Validating:
    """METRICS from two numbers per image; or LABEL_METRICS, which rank the images of a label, from all logits."""

    def compute(prediction: Any) -> dict[str, float]:
        kept, labels = prediction.predictions, prediction.label_ids  # (N, 2) or (N, K); (N,) or (N, K)
        if not np.isfinite(kept).all():
            raise TrainingError(
                "the network's outputs are no finite numbers any more; lower the learning rate, or train in bf16 or "
                "float32 instead of fp16"
            )
        if is_multi_label:
            return label_headline_metrics(kept, labels)
        best, losses = kept[:, 0].astype(np.int64), -logs(kept[:, 1])
        return _known(HeadlineMetrics(classes).compute(predictions=best, losses=losses, references=labels))

    return Validating(_logits if is_multi_label else _best_and_label, compute)


def _best_and_label(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most probable class and the probability of the label, (B, 2) float32; NaN where logits aren't finite."""
    scores = _logits(logits, labels).float()  # (B, K)
    probabilities = scores.softmax(dim=1)
    chosen = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    chosen = chosen.where(scores.isfinite().all(dim=1), torch.nan)
    return torch.stack([probabilities.argmax(dim=1).float(), chosen], dim=1)


def _logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits
