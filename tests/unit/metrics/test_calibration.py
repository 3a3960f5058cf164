import numpy as np
import pytest

from hfft.metrics.calibration import calibration


def two(confidence, right):
    """Probabilities of two classes, where the label is class 0."""
    first = np.where(right, confidence, 1 - np.asarray(confidence))
    return np.stack([first, 1 - first], axis=1), np.zeros(len(right), int)


def test_the_error_is_the_weighted_distance():
    found = calibration(*two([0.95, 0.95, 0.95, 0.95, 0.65], [True, True, True, False, False]))
    assert [(part["low"], part["images"], part["accuracy"]) for part in found["bins"]] == [(0.6, 1, 0), (0.9, 4, 0.75)]
    assert [part["confidence"] for part in found["bins"]] == pytest.approx([0.65, 0.95])
    assert found["expected_calibration_error"] == pytest.approx((4 * 0.2 + 1 * 0.65) / 5)


def test_probabilities_that_tell_the_truth_have_almost_none():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 50_000)
    probabilities, labels = two(confidence, rng.random(50_000) < confidence)
    assert calibration(probabilities, labels)["expected_calibration_error"] < 0.01
    overconfident = calibration(*two(confidence, rng.random(50_000) < confidence - 0.2))
    assert overconfident["expected_calibration_error"] == pytest.approx(0.2, abs=0.01)


def test_certainty_and_even_chances_are_in_bins_of_their_own():
    found = calibration(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 0]))
    assert [(part["low"], part["high"]) for part in found["bins"]] == [(0.4, 0.5), (0.9, 1.0)]
