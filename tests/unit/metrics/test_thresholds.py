import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hfft.errors import ModelError
from hfft.metrics.calibration import calibrated, fit_temperature, yes_and_no
from hfft.metrics.multilabel import LABEL_METRICS
from hfft.metrics.probabilities import log_loss, log_odds, sigmoid, softmax
from hfft.metrics.scores import Scores
from hfft.metrics.thresholds import (
    at_temperature,
    choose_thresholds,
    confidences,
    describe_confidence,
    find_threshold,
    kept_threshold,
    kept_thresholds,
    risk_coverage,
    store_confidence,
)


def draw(images=80, labels=4, seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, labels)) < 0.3).astype(np.uint8)
    return sigmoid(3 * rng.normal(size=truth.shape) + 2 * truth - 2), truth


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_gives_a_better_f1(seed):
    shares, truth = draw(seed=seed)
    chosen = choose_thresholds(shares, truth)
    for k, limit in enumerate(chosen):
        found = f1_score(truth[:, k], shares[:, k] >= limit)
        tried = [f1_score(truth[:, k], shares[:, k] >= other) for other in np.append(shares[:, k], [0, 0.5])]
        assert found == pytest.approx(max(tried))
        assert np.abs(shares[:, k] - limit).min() > 0  # between probabilities, so that rounding decides nothing


def test_a_half_where_it_is_as_good_as_any():
    truth = np.array([[1], [1], [0], [0]])
    assert choose_thresholds(np.array([[0.9], [0.7], [0.3], [0.1]], np.float32), truth) == [0.5]
    assert choose_thresholds(np.array([[0.4], [0.3], [0.1], [0.1]], np.float32), truth) == [pytest.approx(0.2)]


def test_a_label_that_no_image_has_or_all_have():
    shares = np.array([[0.2, 0.2], [0.9, 0.4]], np.float32)
    found = choose_thresholds(shares, np.array([[0, 1], [0, 1]]))
    assert found.tolist() == [0.5, pytest.approx(0.1)]


def test_calibrated_probabilities_give_the_same_labels():
    rng = np.random.default_rng(0)
    logits = 4 * rng.normal(size=(200, 5))
    limits = np.array([0.02, 0.3, 0.5, 0.8, 0.99])
    for temperature in (0.3, 1.0, 2.5):
        moved = sigmoid(logits / temperature) >= at_temperature(limits, temperature)
        assert np.array_equal(moved, sigmoid(logits) >= limits)


def test_a_temperature_makes_log_loss_small():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 3))
    truth = (rng.random(logits.shape) < sigmoid(logits)).astype(np.uint8)
    sure = sigmoid(3 * logits)  # three times too sure
    temperature = fit_temperature(*yes_and_no(log_odds(sure), truth))
    assert temperature == pytest.approx(3, rel=0.1)
    best = LABEL_METRICS["log_loss"](sigmoid(log_odds(sure) / temperature), truth)
    for other in (0.8 * temperature, 1.25 * temperature):
        assert best < LABEL_METRICS["log_loss"](sigmoid(log_odds(sure) / other), truth)
    assert np.allclose(sigmoid(log_odds(sure) / 3), sigmoid(logits), atol=1e-5)


def config(**content):
    return SimpleNamespace(problem_type="multi_label_classification", hfft=content)


def test_kept_thresholds():
    assert kept_thresholds(config(label_thresholds=[0.2, 0.5]), 2).tolist() == [0.2, 0.5]
    assert kept_thresholds(SimpleNamespace(), 3).tolist() == [0.5] * 3
    assert kept_thresholds(config(temperature=1.0), 2).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("found", [[0.5], [0.5, 1.5], [0.5, "x"], 0.5, [0.5, 0]])
def test_thresholds_that_are_none(found):
    with pytest.raises(ModelError, match=r"hfft.label_thresholds .*; allowed: 2 numbers between 0 and 1"):
        kept_thresholds(config(label_thresholds=found), 2)


def test_there_is_no_threshold_for_a_precision():
    with pytest.raises(ModelError, match="precision: is for models that give an image one label"):
        kept_threshold(config(label_thresholds=[0.5]), 0.9)


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
