"""The metrics as modules of `evaluate` that need no network, and all of them for the Trainer."""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from hfft.errors import TrainingError
from hfft.evaluation.details import DETAILS, TABLES
from hfft.evaluation.metrics import METRICS, softmax

MODULES: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {**METRICS, **DETAILS, **TABLES}


class ProbabilityMetric(evaluate.Metric):
    """One of MODULES as an `evaluate` module: predictions are rows of probabilities, references class indices."""

    def __init__(self, name: str) -> None:
        """Choose the metric, a key of MODULES; what is added to the module stays in memory."""
        self._metric = name
        super().__init__(config_name=name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=MODULES[self._metric].__doc__ or "",
            citation="",
            inputs_description="predictions: (N, K) probabilities; references: (N,) class indices",
            features=Features({"predictions": Sequence(Value("float32")), "references": Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {self._metric: MODULES[self._metric](np.asarray(predictions), np.asarray(references))}


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
