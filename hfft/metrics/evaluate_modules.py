"""The metrics as modules of `evaluate` that need no network."""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from hfft.metrics.metrics import METRICS
from hfft.metrics.multilabel import SET_METRICS
from hfft.metrics.multilabel_secondary import SET_DETAILS
from hfft.metrics.secondary import DETAILS, TABLES

MODULES: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {**METRICS, **DETAILS, **TABLES}
SET_MODULES: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {**SET_METRICS, **SET_DETAILS}


class ProbabilityMetric(evaluate.Metric):
    """One of MODULES as an `evaluate` module: predictions are rows of probabilities, references class indices.

    Of SET_MODULES, for images with any number of labels, references are rows of 0 and 1.
    """

    def __init__(self, name: str, *, is_multi_label: bool = False) -> None:
        """Choose the metric, a key of MODULES or of SET_MODULES; what is added to the module stays in memory."""
        self._metric = name
        self._is_multi_label = is_multi_label
        self._compute_metric = (SET_MODULES if is_multi_label else MODULES)[name]
        super().__init__(config_name=name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        shape = "(N, K) of 0 and 1" if self._is_multi_label else "(N,) class indices"
        kind = Sequence(Value("int64")) if self._is_multi_label else Value("int64")
        return evaluate.MetricInfo(
            description=self._compute_metric.__doc__ or "",
            citation="",
            inputs_description=f"predictions: (N, K) probabilities; references: {shape}",
            features=Features({"predictions": Sequence(Value("float32")), "references": kind}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {self._metric: self._compute_metric(np.asarray(predictions), np.asarray(references))}
