from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hfft.errors import ModelError
from hfft.metrics.calibration import answers, fit_temperature
from hfft.metrics.multilabel import LABEL_METRICS
from hfft.metrics.probabilities import log_odds, sigmoid
from hfft.metrics.selective import kept_threshold
from hfft.metrics.thresholds import at_temperature, choose_thresholds, kept_thresholds


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
    temperature = fit_temperature(*answers(sure, truth))
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
