"""Where the loss of a range test falls fastest, on curves whose answer is known."""

import numpy as np
import pytest

from hfft.errors import RecipeError
from hfft.training.range_test import evaluate_range

RATES = [float(rate) for rate in np.geomspace(1e-6, 1.0, 121)]  # 20 steps per decade


def falling(middle, lowest):
    """A loss that falls around one rate, and rises behind another until the test ends."""
    steps = np.log10(RATES)
    fall = 2 / (1 + np.exp(6 * (steps - np.log10(middle))))
    rise = np.where(steps > np.log10(lowest), np.exp(5 * (steps - np.log10(lowest))) - 1, 0)
    return np.minimum(0.5 + fall + rise, 4.0).tolist()


@pytest.mark.parametrize(("middle", "lowest"), [(1e-4, 1e-2), (1e-3, 1e-1)])
def test_the_steepest_fall_is_suggested(middle, lowest):
    found = evaluate_range("last", RATES, falling(middle, lowest))
    assert found.suggestion is not None
    assert middle / 2 <= found.suggestion <= 2 * middle
    assert lowest / 10 <= found.lowest_loss_at <= 2 * lowest  # the mean sees the rise before it comes


def test_noise_moves_the_suggestion_little():
    noisy = np.array(falling(1e-3, 1e-1)) + np.random.default_rng(0).normal(0, 0.15, len(RATES))
    found = evaluate_range("last", RATES, noisy.tolist())
    assert found.suggestion is not None
    assert 3e-4 <= found.suggestion <= 4e-3


def test_a_loss_that_does_not_fall_has_no_suggestion():
    assert evaluate_range("last", RATES, [1.0] * len(RATES)).suggestion is None
    assert evaluate_range("last", RATES, np.linspace(1, 5, len(RATES)).tolist()).suggestion is None


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_has_no_suggestion(seed):
    noise = np.random.default_rng(seed).normal(0.45, 0.15, len(RATES))
    assert evaluate_range("last", RATES, noise.tolist()).suggestion is None


def test_the_mean_of_neighbours_has_no_bias_at_the_ends():
    assert evaluate_range("last", RATES, [2.0] * len(RATES)).smoothed == pytest.approx((2.0,) * len(RATES))


def test_too_few_losses_are_refused():
    with pytest.raises(RecipeError, match="last"):
        evaluate_range("last", RATES[:2], [1.0, 2.0])
