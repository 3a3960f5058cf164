"""Two models on the same images: differences of the metrics with paired bootstrap intervals, and McNemar's test."""

from dataclasses import dataclass

import numpy as np

from hfft.evaluation.intervals import RESAMPLES, Outcomes, Strata, chunk, interval, tally_draws
from hfft.evaluation.metrics import measure, tally


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test of whether two models are right equally often.

    Attributes:
        only_first: Images that the first model alone gets right.
        only_second: Images that the second alone gets right.
        p_value: Two-sided: how probable a split at least as uneven is, if either is as probable as the other.
    """

    only_first: int
    only_second: int
    p_value: float


def differences(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Every metric of the second model minus that of the first, with its 95 % interval.

    Each of 1,000 resamples draws images, within each class as in `with_intervals`, and takes both models' predictions
    of them: what makes an image hard or easy for both cancels out.

    Args:
        first: Probabilities of the first model, (N, K).
        second: Those of the second, (N, K).
        labels: (N,), N > 0.
        seed: Seeds the resampling.

    Returns:
        Metric name to `value`, `low` and `high`.
    """
    rng, strata = np.random.default_rng(seed), Strata.of(labels)
    outcomes = [Outcomes.of(probabilities, labels) for probabilities in (first, second)]
    at_once = chunk(first.shape)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, RESAMPLES, at_once):
        draws = strata.draw(rng, min(at_once, RESAMPLES - start))
        one, other = (measure(tally_draws(draws, strata, outcome)) for outcome in outcomes)
        for name in one:
            parts.setdefault(name, []).append(other[name] - one[name])
    before, after = (measure(tally(probabilities, labels)) for probabilities in (first, second))
    return {name: interval(float(after[name] - before[name]), np.concatenate(found)) for name, found in parts.items()}


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's exact test, by the binomial distribution.

    Source: McNemar, Psychometrika 12 (1947), 153-157.

    Args:
        first: Whether the first model is right, (N,).
        second: Whether the second is.
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    count, fewer = only_first + only_second, min(only_first, only_second)
    steps = np.arange(fewer)
    ways = np.concatenate([[0.0], np.cumsum(np.log((count - steps) / (steps + 1)))])  # log of count over 0..fewer
    tail = np.exp(ways - count * np.log(2)).sum()
    return McNemar(only_first, only_second, float(min(1.0, 2 * tail)))
