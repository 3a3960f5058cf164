import json

import numpy as np
import pytest

from hfft.metrics.calibration import calibrated, fit_temperature
from hfft.metrics.probabilities import log_loss, softmax
from hfft.metrics.scores import Scores
from hfft.metrics.selective import (
    confidences,
    describe_confidence,
    find_threshold,
    risk_coverage,
    store_confidence,
)


def drawn(temperature, images=4000, classes=4):
    """Answers of a model whose logits are too large by `temperature`, and labels that follow the true ones."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(images, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    return softmax(logits * temperature), labels


def scores(probabilities, labels):
    names = tuple(str(k) for k in range(probabilities.shape[1]))
    return Scores(names, tuple(map(str, range(len(labels)))), labels, probabilities, {}, {})


def test_risk_grows_from_the_most_confident_answer_on():
    found = risk_coverage(np.array([0.5, 0.9, 0.7, 0.8]), np.array([False, True, False, True]))
    assert found["coverage"] == [0.25, 0.5, 0.75, 1]
    assert found["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)


def test_equal_confidences_have_no_order():
    right = np.array([True, True, False, False])
    first, second = (risk_coverage(np.full(4, 0.8), order) for order in (right, right[::-1]))
    assert first == second
    assert first["risk"] == [0.5] * 4


def test_a_long_risk_curve_has_100_points_and_ends_at_everything():
    rng = np.random.default_rng(0)
    found = risk_coverage(rng.random(1234), rng.random(1234) < 0.8)
    assert len(found["coverage"]) == len(found["risk"]) == 100
    assert found["coverage"][-1] == 1


def test_a_threshold_is_the_least_confidence_of_that_precision():
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05])
    right = np.array([True] * 9 + [True, False])
    found = find_threshold(confidence, right, 0.9)
    assert found.confidence == 0.0  # 10 of 11 are right: all may be believed
    assert (found.precision, found.coverage) == (pytest.approx(10 / 11), 1)
    right[8] = False  # 9 of the first 10
    found = find_threshold(confidence, right, 0.9)
    assert found.confidence == pytest.approx((0.1 + 0.05) / 2)
    assert found.precision == pytest.approx(0.9)


def test_a_threshold_needs_enough_answers_and_may_not_exist():
    assert find_threshold(np.linspace(0.9, 0.5, 19), np.ones(19, bool), 0.95) is None  # 20 could tell
    assert find_threshold(np.linspace(0.9, 0.5, 20), np.ones(20, bool), 0.95) is not None
    assert find_threshold(np.linspace(0.9, 0.5, 200), np.zeros(200, bool), 0.9) is None


def test_what_metrics_json_holds_is_fitted_on_validation_and_measured_on_test(tmp_path):
    probabilities, labels = drawn(3.0, 3000)
    splits = {
        "validation": scores(probabilities[:1000], labels[:1000]),
        "test": scores(probabilities[1000:], labels[1000:]),
    }
    found = describe_confidence(splits)
    assert json.loads(json.dumps(found)) == found
    assert found["temperature"] == fit_temperature(probabilities[:1000], labels[:1000])
    assert found["fitted_on"]["images"] == 1000
    assert found["measured_on"] == "test"
    assert found["before"]["log_loss"] == pytest.approx(log_loss(probabilities[1000:], labels[1000:]))
    assert found["after"]["log_loss"] < found["before"]["log_loss"]
    threshold = found["thresholds"]["0.9"]
    assert threshold["validation"]["precision"] >= 0.9
    confidence, right = confidences(calibrated(probabilities[1000:], found["temperature"]), labels[1000:])
    kept = confidence >= threshold["confidence"]
    assert threshold["test"] == {
        "precision": pytest.approx(right[kept].mean()),
        "coverage": pytest.approx(kept.mean()),
    }

    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    store_confidence(tmp_path, found)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["model_type"] == "vit"
    assert kept["hfft"]["temperature"] == found["temperature"]
    assert kept["hfft"]["thresholds"]["0.9"] == threshold["confidence"]


def test_without_validation_images_nothing_can_be_fitted():
    assert describe_confidence({"test": scores(*drawn(1.0, 10))}) is None
