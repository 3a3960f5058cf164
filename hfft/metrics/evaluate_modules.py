"""The metrics as modules of `evaluate` that need no network: what a run measures with, and each one alone."""

from collections.abc import Callable, Iterable
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


class _Module(evaluate.Metric):
    """A function of columns, arrays (N, ...), as a module; it writes nothing."""

    def __init__(
        self, name: str, function: Callable[..., Any], metrics: Iterable[str], columns: dict[str, Any], shapes: str
    ) -> None:
        self._function, self._metrics, self._columns, self._shapes = function, metrics, columns, shapes
        super().__init__(config_name=name, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""  # no folder in the user's cache

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=", ".join(self._metrics).replace("_", " "),
            citation="",
            inputs_description=self._shapes,
            features=Features(self._columns),
        )

    def _compute(self, **columns: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._function(**{name: None if one is None else np.asarray(one) for name, one in columns.items()})


class ProbabilityMetric(_Module):
    """One of MODULES as an `evaluate` module: predictions are rows of probabilities, references class indices.

    Of MULTI_LABEL_MODULES, for images with any number of labels, references are rows of 0 and 1.
    """

    def __init__(self, name: str, *, is_multi_label: bool = False) -> None:
        """Choose the metric, a key of MODULES or of MULTI_LABEL_MODULES."""
        metric = (MULTI_LABEL_MODULES if is_multi_label else MODULES)[name]
        columns = {"predictions": Sequence(Value("float32")), "references": Value("int64")}
        if is_multi_label:
            columns["references"] = Sequence(Value("int64"))
        shape = "(N, K) of 0 and 1" if is_multi_label else "(N,) class indices"
        super().__init__(
            name,
            lambda predictions, references: {name: metric(predictions, references)},
            [name],
            columns,
            f"predictions: (N, K) probabilities; references: {shape}",
        )


def headline_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """METRICS of probabilities (N, K) and labels (N,), by their module."""
    losses = image_losses(probabilities, labels)
    return _of_best_class(probabilities.argmax(axis=1), losses, labels, probabilities.shape[1])


def _of_best_class(predictions: np.ndarray, losses: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """METRICS from two numbers per image: its most probable class, and the loss of its label in nats."""

    def compute(predictions: np.ndarray, losses: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return measure(tally_of(predictions, losses, references, classes))

    columns = {"predictions": Value("int64"), "losses": Value("float64"), "references": Value("int64")}
    module = _Module("headline", compute, METRICS, columns, "predictions, references: class indices; losses: nats")
    return _known(module.compute(predictions=predictions, losses=losses, references=labels))


def label_headline_metrics(
    logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | None = None
) -> dict[str, Any]:
    """LABEL_METRICS of logits (N, K) and labels (N, K), by their module; a threshold (K,) is 0.5 if not given."""

    def compute(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        given = None if thresholds is None else sigmoid(predictions) >= thresholds
        return LabelOutcomes.of_logits(predictions, references, given).metrics

    columns = {"predictions": Sequence(Value("float64")), "references": Sequence(Value("int64"))}
    shapes = "predictions: (N, K) logits; references: (N, K) of 0 and 1"
    module = _Module("label_headline", compute, LABEL_METRICS, columns, shapes)
    return _known(module.compute(predictions=logits.astype(np.float64), references=(labels > 0).astype(np.int64)))


def _known(found: dict[str, Any] | None) -> dict[str, Any]:
    assert found is not None  # which other processes of a launch get, where they share one module
    return found


def validating(
    classes: int, *, is_multi_label: bool = False
) -> tuple[Callable[[Any, torch.Tensor], torch.Tensor], Callable[[Any], dict[str, float]]]:
    """Trainer's preprocess_logits_for_metrics, of a batch (B, K), and its compute_metrics, of all that was kept.

    METRICS come from two numbers per image, LABEL_METRICS, which rank the images of a label, from all logits.
    """

    def compute(prediction: Any) -> dict[str, float]:
        kept, labels = prediction.predictions, prediction.label_ids  # (N, 2) or (N, K); (N,) or (N, K)
        if not np.isfinite(kept).all():
            raise TrainingError(
                "the network's outputs are no finite numbers any more; lower the learning rate, or train in bf16 or "
                "float32 instead of fp16"
            )
        if is_multi_label:
            return label_headline_metrics(kept, labels)
        return _of_best_class(kept[:, 0].astype(np.int64), -logs(kept[:, 1]), labels, classes)

    return (_logits if is_multi_label else _best_and_label), compute


def _best_and_label(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most probable class and the probability of the label, (B, 2) float32; NaN where logits aren't finite."""
    scores = _logits(logits, labels).float()  # (B, K)
    probabilities = scores.softmax(dim=1)
    chosen = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    chosen = chosen.where(scores.isfinite().all(dim=1), torch.nan)
    return torch.stack([probabilities.argmax(dim=1).float(), chosen], dim=1)


def _logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits
