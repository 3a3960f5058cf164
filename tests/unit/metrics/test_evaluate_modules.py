import math

import evaluate
import numpy as np
import pytest

from hfft.metrics.evaluate_modules import ProbabilityMetric

PROBABILITIES = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]], np.float32)
LABELS = np.array([0, 0, 0, 1])
EXPECTED = {
    "accuracy": 3 / 4,
    "balanced_accuracy": (2 / 3 + 1) / 2,
    "macro_f1": (4 / 5 + 2 / 3) / 2,
    "log_loss": -math.log(0.9 * 0.6 * 0.3 * 0.8) / 4,
}


def test_they_are_modules_of_evaluate_that_combine_and_stream():
    combined = evaluate.combine([ProbabilityMetric(name) for name in EXPECTED])
    for part in (slice(0, 3), slice(3, 4)):
        combined.add_batch(predictions=PROBABILITIES[part], references=LABELS[part])
    assert combined.compute() == pytest.approx(EXPECTED, abs=1e-6)
