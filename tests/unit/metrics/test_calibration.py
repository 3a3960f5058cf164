import numpy as np
import pytest

from hfft.metrics.calibration import calibrated, calibration, fit_temperature
from hfft.metrics.probabilities import log_loss, softmax


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


def drawn(temperature, images=4000, classes=4):
    """Answers of a model whose logits are too large by `temperature`, and labels that follow the true ones."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(images, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    return softmax(logits * temperature), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature):
    probabilities, labels = drawn(temperature)
    found = fit_temperature(probabilities, labels)
    assert found == pytest.approx(temperature, rel=0.06)
    least = log_loss(calibrated(probabilities, found), labels)
    for other in (0.97 * found, 1.03 * found, 1.0):
        assert least <= log_loss(calibrated(probabilities, other), labels) + 1e-7


def test_calibrated_probabilities_are_the_softmax_of_divided_logits():
    logits = np.random.default_rng(0).normal(size=(6, 5)) * 4
    assert calibrated(softmax(logits), 2.5) == pytest.approx(softmax(logits / 2.5), abs=1e-6)
    assert (calibrated(softmax(logits), 2.5).argsort(axis=1) == logits.argsort(axis=1)).all()


def test_no_wrong_answer_gives_no_reason_to_be_more_certain():
    assert fit_temperature(np.array([[0.6, 0.4], [0.3, 0.7]]), np.array([0, 1])) == 1


def test_a_model_that_is_always_wrong_stops_at_the_bound():
    assert fit_temperature(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([1, 1])) == pytest.approx(20)


def expected_calibration_error(probabilities, labels):
    return calibration(probabilities, labels, bins=15)["expected_calibration_error"]


def test_fifteen_bins_tell_apart_what_ten_do_not():
    probabilities = np.array([[0.62, 0.38]] * 2 + [[0.69, 0.31]] * 2)
    labels = np.array([0, 0, 1, 1])  # right at 0.62, wrong at 0.69
    assert expected_calibration_error(probabilities, labels) == pytest.approx((0.38 + 0.69) / 2)
    assert calibration(probabilities, labels)["expected_calibration_error"] == pytest.approx(0.655 - 0.5)


def test_calibration_lowers_the_error_of_a_model_that_is_too_certain():
    probabilities, labels = drawn(3.0)
    found = fit_temperature(probabilities, labels)
    before = expected_calibration_error(probabilities, labels)
    assert expected_calibration_error(calibrated(probabilities, found), labels) < before / 4
