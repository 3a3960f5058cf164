import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from hfft.metrics.metrics import METRICS, softmax

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(60, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 60)  # class 3 never occurs
PROBABILITIES = softmax(LOGITS)
PREDICTED = LOGITS.argmax(axis=1)


def sklearn_says():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a predicted class that does not occur
        return {
            "accuracy": sklearn_metrics.accuracy_score(LABELS, PREDICTED),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(LABELS, PREDICTED),
            "macro_f1": sklearn_metrics.f1_score(LABELS, PREDICTED, labels=range(4), average="macro", zero_division=0),
            "log_loss": sklearn_metrics.log_loss(LABELS, PROBABILITIES.astype(np.float64), labels=range(4)),
        }


def test_every_metric_agrees_with_scikit_learn():
    assert sklearn_says().keys() == METRICS.keys()
    for name, value in sklearn_says().items():
        assert METRICS[name](PROBABILITIES, LABELS) == pytest.approx(value, abs=1e-6)


def test_a_class_neither_seen_nor_predicted_counts_as_0_in_macro_f1_alone():
    padded = np.pad(PROBABILITIES, [(0, 0), (0, 1)])
    for name, value in sklearn_says().items():
        expected = value * 4 / 5 if name == "macro_f1" else value
        assert METRICS[name](padded, LABELS) == pytest.approx(expected, abs=1e-6)


def test_log_loss_of_a_certain_mistake_is_finite():
    assert METRICS["log_loss"](np.array([[1.0, 0.0]], np.float32), np.array([1])) == pytest.approx(87.3365, abs=1e-3)


def test_softmax_of_large_logits():
    assert softmax(np.array([[1000.0, 0.0]], np.float32)).tolist() == [[1.0, 0.0]]
