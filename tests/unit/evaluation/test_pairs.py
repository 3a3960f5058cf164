import numpy as np
import pytest
from scipy.stats import binomtest

from hfft.evaluation import intervals
from hfft.evaluation.intervals import with_intervals
from hfft.evaluation.pairs import differences, mcnemar


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
        assert interval["low"] <= interval["value"] <= interval["high"]
    assert found.keys() == one.keys()
    back = differences(second, first, labels)
    assert back["accuracy"]["low"] == pytest.approx(-found["accuracy"]["high"])


def test_the_same_predictions_leave_no_doubt():
    labels = np.arange(50) % 2
    probabilities = np.random.default_rng(0).dirichlet([1, 1], 50)
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert set(map(str, differences(probabilities, probabilities, labels).values())) == {str(nothing)}


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
        pytest.approx(0.02 - half, abs=0.003),
        pytest.approx(0.02 + half, abs=0.003),
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
    assert 0.90 <= hits / 200 <= 0.99


def test_the_memory_at_hand_changes_no_number(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    pair = [rng.dirichlet([1, 1], 100) for _ in range(2)]
    expected = differences(*pair, labels)
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", 1300)
    assert differences(*pair, labels) == expected


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
