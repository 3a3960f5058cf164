"""Where the loss of a range test falls fastest, on curves whose answer is known."""

import numpy as np
import pytest

from hfft.errors import RecipeError
from hfft.training.range_test import evaluate_range

RATES = [float(rate) for rate in np.geomspace(1e-6, 1.0, 121)]  # 20 steps per decade


def falling(middle, lowest):
    """A loss that falls around one rate, and rises behind another."""
    steps = np.log10(RATES)
    fall = 2 / (1 + np.exp(6 * (steps - np.log10(middle))))
    rise = np.where(steps > np.log10(lowest), np.exp(5 * (steps - np.log10(lowest))) - 1, 0)
    return (0.5 + fall + rise).tolist()


@pytest.mark.parametrize(("middle", "lowest"), [(1e-4, 1e-2), (1e-3, 1e-1)])
def test_the_steepest_fall_is_suggested(middle, lowest):
    found = evaluate_range("last", RATES, falling(middle, lowest))
    assert found.suggestion is not None
    # The running mean lags behind by up to its length, half a decade.
    assert middle <= found.suggestion <= 4 * middle
    assert lowest / 4 <= found.lowest_loss_at <= 4 * lowest


def test_noise_moves_the_suggestion_little():
    noisy = np.array(falling(1e-3, 1e-1)) + np.random.default_rng(0).normal(0, 0.05, len(RATES))
    found = evaluate_range("last", RATES, noisy.tolist())
    assert found.suggestion is not None
    assert 2e-4 <= found.suggestion <= 1e-2


def test_a_loss_that_does_not_fall_has_no_suggestion():
    assert evaluate_range("last", RATES, [1.0] * len(RATES)).suggestion is None
    assert evaluate_range("last", RATES, np.linspace(1, 5, len(RATES)).tolist()).suggestion is None


def test_the_running_mean_has_no_bias_to_the_start():
    assert evaluate_range("last", RATES[:5], [2.0] * 5).smoothed == pytest.approx((2.0,) * 5)


def test_too_few_losses_are_refused():
    with pytest.raises(RecipeError, match="last"):
        evaluate_range("last", RATES[:2], [1.0, 2.0])
