import warnings

import evaluate
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from hfft.metrics.evaluate_modules import MODULES, ProbabilityMetric
from hfft.metrics.metrics import DETAILS, METRICS, TABLES, details, top_k_accuracy
from hfft.metrics.probabilities import softmax

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


def one_against_the_rest(metric, probabilities, labels):
    return np.mean([metric(labels == number, probabilities[:, number]) for number in np.unique(labels)])


def in_bins(probabilities, labels):
    """Expected calibration error, bin by bin, with the definition's own loops."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - right[inside].mean())
    return total / len(labels)


def sklearn_details(probabilities, labels):
    predicted, classes = probabilities.argmax(axis=1), range(probabilities.shape[1])
    common = {"labels": classes, "zero_division": 0}
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(labels, predicted, **common)
    return {
        "top_5_accuracy": sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=classes),
        "micro_f1": sklearn_metrics.f1_score(labels, predicted, average="micro", **common),
        "weighted_f1": sklearn_metrics.f1_score(labels, predicted, average="weighted", **common),
        "cohen_kappa": sklearn_metrics.cohen_kappa_score(labels, predicted),
        "roc_auc": one_against_the_rest(sklearn_metrics.roc_auc_score, probabilities, labels),
        "average_precision": one_against_the_rest(sklearn_metrics.average_precision_score, probabilities, labels),
        "expected_calibration_error": in_bins(probabilities, labels),
        "brier_score": np.mean(np.sum((probabilities - np.eye(len(classes))[labels]) ** 2, axis=1)),
        "confusion_matrix": sklearn_metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
        "precision_by_class": list(precision),
        "recall_by_class": list(recall),
        "f1_by_class": list(f1),
    }


def images(classes, present, count=300):
    """Probabilities that know something of the labels, of which some classes never occur."""
    labels = RNG.integers(0, present, count)
    logits = RNG.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    return softmax(logits), labels


@pytest.mark.parametrize(("classes", "present"), [(7, 7), (8, 6)], ids=["all occur", "two don't"])
def test_every_one_agrees_with_scikit_learn(classes, present):
    probabilities, labels = images(classes, present)
    expected = sklearn_details(probabilities, labels)
    assert expected.keys() == {**DETAILS, **TABLES}.keys()
    for name, value in expected.items():
        found = {**DETAILS, **TABLES}[name](probabilities, labels)
        assert np.asarray(found) == pytest.approx(np.asarray(value), abs=1e-6), name


def test_equal_probabilities_are_ranked_as_scikit_learn_does():
    probabilities, labels = images(3, 3)
    coarse = np.round(probabilities, 1)
    expected = {"roc_auc": sklearn_metrics.roc_auc_score, "average_precision": sklearn_metrics.average_precision_score}
    for name, metric in expected.items():
        assert DETAILS[name](coarse, labels) == pytest.approx(one_against_the_rest(metric, coarse, labels), abs=1e-9)


def test_two_classes_have_one_roc_curve():
    probabilities, labels = images(2, 2)
    expected = sklearn_metrics.roc_auc_score(labels, probabilities[:, 1])
    assert DETAILS["roc_auc"](probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_of_equal_classes_the_first_is_more_probable():
    even = np.full((4, 4), 0.25)
    assert [top_k_accuracy(even, np.arange(4), k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]


def test_what_is_not_defined_is_left_out():
    probabilities, labels = images(3, 1)
    assert set(DETAILS) - set(details(probabilities, labels)) == {"top_5_accuracy", "roc_auc", "average_precision"}
    certain = np.eye(3)[labels]
    assert "cohen_kappa" not in details(certain, labels)


def test_all_are_modules_of_evaluate_that_stream():
    probabilities, labels = images(6, 6, count=50)
    combined = evaluate.combine([ProbabilityMetric(name) for name in MODULES])
    for part in (slice(0, 30), slice(30, 50)):
        combined.add_batch(predictions=probabilities[part], references=labels[part])
    found = combined.compute()
    assert found.keys() == {**METRICS, **DETAILS, **TABLES}.keys()
    for name, metric in MODULES.items():
        assert np.asarray(found[name]) == pytest.approx(np.asarray(metric(probabilities, labels)), abs=1e-6)


def test_two_sure_classes_have_one_area():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    margins = np.clip(30 * rng.normal(size=300) + 20 * (labels - 0.5), -70, 70)  # logits of +-35
    margins += 0.01 * rng.normal(size=300)
    probabilities = softmax(np.stack([-margins / 2, margins / 2], axis=1))
    assert np.mean(probabilities.max(axis=1) == 1) > 0.2
    assert DETAILS["roc_auc"](probabilities, labels) == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, margins), abs=1e-9
    )
