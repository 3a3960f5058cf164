import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss

from hfft.evaluation import intervals
from hfft.evaluation.intervals import Outcomes, Strata, tally_draws, with_intervals
from hfft.evaluation.metrics import METRICS, measure

SIZES = {"100 x 3": [3] * 100, "50 x 10": [10] * 50, "skewed": [200, 20, 2], "one of one": [50, 1], "even": [300, 300]}


def one_hot(predicted, classes):
    return np.eye(classes, dtype=np.float32)[predicted]


def simulate(rng, sizes, recall):
    """Labels with `sizes` images per class; each image is right with probability `recall`."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    wrong = (labels + rng.integers(1, len(sizes), len(labels))) % len(sizes)
    return one_hot(np.where(rng.random(len(labels)) < recall, labels, wrong), len(sizes)), labels


def coverage(simulations, metric, truth):
    found = [with_intervals(probabilities, labels)[metric] for probabilities, labels in simulations]
    return np.mean([interval["low"] <= truth <= interval["high"] for interval in found])


def test_intervals_cover_what_the_binomial_says():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 400)
    right = rng.random(400) < 0.8
    probabilities = np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)] * 0.8 + 0.1
    interval = with_intervals(probabilities, labels)["accuracy"]
    half = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert interval["value"] == right.mean()
    assert interval["low"] == pytest.approx(right.mean() - half, abs=0.01)
    assert interval["high"] == pytest.approx(right.mean() + half, abs=0.01)


def test_intervals_are_the_same_at_every_call():
    probabilities, labels = np.random.default_rng(0).dirichlet([1, 1], 20), np.arange(20) % 2
    assert with_intervals(probabilities, labels) == with_intervals(probabilities, labels)
    assert with_intervals(probabilities, labels).keys() == METRICS.keys()


def test_perfect_predictions_of_rare_classes_leave_no_doubt():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 3))
    found = with_intervals(one_hot(labels, 100), labels)
    certain = {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found == {
        **dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"), certain),
        "log_loss": {"value": 0.0, "low": 0.0, "high": 0.0},
    }


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recall", [0.6, 0.9])
def test_an_interval_contains_its_own_value(sizes, recall):
    for name, found in with_intervals(*simulate(np.random.default_rng(0), sizes, recall)).items():
        assert found["low"] < found["value"] < found["high"], name


def test_95_of_100_intervals_of_the_accuracy_contain_the_truth():
    rng = np.random.default_rng(0)
    simulations = (simulate(rng, rng.multinomial(656, [0.5, 0.5]), 0.87) for _ in range(200))
    assert 0.92 <= coverage(simulations, "accuracy", 0.87) <= 0.98


def test_so_do_those_of_classes_of_three_images():
    rng = np.random.default_rng(0)
    simulations = (simulate(rng, [3] * 20, 0.8) for _ in range(400))
    assert 0.92 <= coverage(simulations, "balanced_accuracy", 0.8) <= 0.98  # 0.88 without the weights of Rao and Wu


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_one_resample_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 3], [30, 7, 1]))  # class 2 never occurs
    probabilities = rng.dirichlet([1] * 4, len(labels))
    strata = Strata.of(labels)
    draws = strata.draw(rng, 5)  # (5, 29 + 6 + 1)
    assert np.unique(labels[draws], axis=0).tolist() == [[0] * 29 + [1] * 6 + [3]]
    found = measure(tally_draws(draws, strata, Outcomes.of(probabilities, labels)))
    for row, draw in enumerate(draws):
        truth, predicted = labels[draw], probabilities[draw].argmax(axis=1)
        weights = {"sample_weight": (np.array([30, 7, 0, 1]) / [29, 6, 1, 1])[truth]}
        expected = {
            "accuracy": accuracy_score(truth, predicted, **weights),
            "balanced_accuracy": balanced_accuracy_score(truth, predicted, **weights),
            "macro_f1": f1_score(truth, predicted, labels=range(4), average="macro", zero_division=0, **weights),
            "log_loss": log_loss(truth, probabilities[draw], labels=range(4), **weights),
        }
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected)


def test_the_memory_at_hand_changes_no_number(monkeypatch):
    probabilities, labels = simulate(np.random.default_rng(0), [40, 30, 5], 0.7)
    expected = with_intervals(probabilities, labels)
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", 1000)  # 13 resamples in a chunk
    assert with_intervals(probabilities, labels) == expected


def test_an_answer_that_never_changes_has_an_interval_of_no_width():
    labels = np.repeat([0, 1], [451, 205])
    found = with_intervals(one_hot(np.zeros(656, int), 2), labels)
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert found[name]["low"] == pytest.approx(found[name]["high"], abs=1e-12)
