import numpy as np
import pytest
from scipy.stats import binomtest

from hfft.metrics.intervals import with_intervals
from hfft.metrics.paired_tests import differences, mcnemar, summed


def predictions(rng, labels, wrong):
    """Probabilities of two classes that are wrong for some images."""
    predicted = np.where(wrong, 1 - labels, labels)
    return np.where(np.eye(2, dtype=bool)[predicted], 0.8, 0.2).astype(np.float32)


def test_a_difference_is_that_of_the_metrics():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    first, second = (rng.dirichlet([1, 1, 1], 200) for _ in range(2))
    found = differences(first, second, labels)
    one, other = (with_intervals(probabilities, labels) for probabilities in (first, second))
    for name, interval in found.items():
        assert interval["value"] == pytest.approx(other[name]["value"] - one[name]["value"])
        assert interval["low"] < interval["value"] < interval["high"]
    assert found.keys() == one.keys()
    back = differences(second, first, labels)
    assert back["accuracy"]["low"] == pytest.approx(-found["accuracy"]["high"])


def test_the_same_predictions_leave_a_doubt_that_shrinks_with_the_images():
    for images, most in ((50, 0.08), (5000, 0.001)):
        labels = np.arange(images) % 2
        probabilities = np.random.default_rng(0).dirichlet([1, 1], images)
        found = differences(probabilities, probabilities, labels)
        for name in ("accuracy", "balanced_accuracy", "macro_f1"):
            assert found[name]["value"] == 0
            assert found[name]["low"] == pytest.approx(-found[name]["high"])
            assert 0 < found[name]["high"] < most
        assert found["log_loss"] == {"value": 0, "low": None, "high": None}


@pytest.mark.parametrize("images", [12, 40, 300])
def test_the_accuracy_differs_clearly_where_mcnemar_says_so(images):
    for only_first in range(13):
        for only_second in range(min(images - only_first, 40)):
            parts = np.repeat([-1.0, 1.0, 0.0], [only_first, only_second, images - only_first - only_second]) / images
            found = summed(parts, images)
            is_clear = found["low"] > 0 or found["high"] < 0
            assert is_clear == (mcnemar(parts < 0, parts > 0).p_value < 0.05), (only_first, only_second)


@pytest.mark.parametrize(
    ("sizes", "differing", "better"),
    [([15, 15], 0.05, 0.9), ([50, 50], 0.1, 0.8), ([20, 5], 0.3, 0.7), ([1] * 30, 0.3, 0.6)],
)
def test_simulated_differences_cover_the_truth(sizes, differing, better):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    hits = {"accuracy": 0, "balanced_accuracy": 0}
    for _ in range(150):
        is_one = rng.random(len(labels)) < differing
        wrong = (labels + 1) % len(sizes)
        is_second = is_one & (rng.random(len(labels)) < better)
        first, second = (np.eye(len(sizes))[np.where(w, wrong, labels)] for w in (is_second, is_one & ~is_second))
        found = differences(first, second, labels)
        for name in hits:
            hits[name] += found[name]["low"] <= differing * (2 * better - 1) <= found[name]["high"]
    assert min(hits.values()) / 150 >= 0.93


def test_pairs_tell_more_than_two_intervals():
    """Two models that are wrong on the same images, but for 12 which only the first gets wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    hard = rng.random(600) < 0.2
    more = hard.copy()
    more[np.flatnonzero(~hard)[:12]] = True
    first, second = (predictions(rng, labels, wrong) for wrong in (more, hard))
    found = differences(first, second, labels)["accuracy"]
    assert found["value"] == pytest.approx(12 / 600)
    half = 1.96 * np.sqrt(12 / 600 * (1 - 12 / 600) / 600)  # of a share of 12 in 600
    assert (found["low"], found["high"]) == (
        pytest.approx(0.02 - half, abs=0.004),
        pytest.approx(0.02 + half, abs=0.004),
    )
    one, other = (with_intervals(probabilities, labels)["accuracy"] for probabilities in (first, second))
    assert one["high"] > other["low"]  # each alone says nothing


def test_an_interval_of_no_difference_covers_0_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        labels = rng.integers(0, 2, 150)
        first, second = (predictions(rng, labels, rng.random(150) < 0.3) for _ in range(2))
        found = differences(first, second, labels)["accuracy"]
        hits += found["low"] <= 0 <= found["high"]
    assert hits / 200 >= 0.93


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (3, 3), (10, 2), (2, 10), (40, 61), (0, 40)])
def test_mcnemar_is_a_binomial_test(only_first, only_second):
    first = np.repeat([True, True, False, False], [5, only_first, only_second, 4])
    second = np.repeat([True, False, True, False], [5, only_first, only_second, 4])
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    count = only_first + only_second
    expected = binomtest(only_first, count, 0.5).pvalue if count else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_images():
    first = np.arange(200_000) < 100_000
    assert mcnemar(first, ~first).p_value == 1.0
    assert mcnemar(np.ones(5000, bool), np.zeros(5000, bool)).p_value == 0.0
