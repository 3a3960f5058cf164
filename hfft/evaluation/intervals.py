"""Bootstrap intervals of the metrics, from the probabilities and labels that `score` hands over."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hfft.evaluation.metrics import Tally, losses, measure, tally

RESAMPLES = 1000
_ROUNDING = 1e-12
_NUMBERS_AT_ONCE = 2**20  # in one array of 8-byte numbers; about six are alive at a time


def with_intervals(probabilities: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Every metric with the 2.5 % and 97.5 % quantiles over 1,000 stratified resamples of the images.

    Images are drawn within each true class, so every resample has every class as often as the split has it. The
    intervals are therefore conditional on these class counts: they say how far a metric would move with other images
    of the same classes in the same numbers, not with another mix of classes. A class with a single image can't vary
    and adds nothing to the width, so a split of such classes alone gets intervals of width 0. With two or three
    images per class the interval of macro F1 covers less than 95 %.

    Args:
        probabilities: (N, K).
        labels: (N,), N > 0.
        seed: Seeds the resampling.

    Returns:
        Metric name to `value`, `low` and `high`.
    """
    parts = [measure(part) for part in _resamples(probabilities, labels, np.random.default_rng(seed))]
    results = {}
    for name, value in measure(tally(probabilities, labels)).items():
        results[name] = interval(float(value), np.concatenate([part[name] for part in parts]))
    return results


def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    """`value`, and the 2.5 % and 97.5 % quantiles of its resamples (R,), which a rounding error doesn't set apart."""
    low, high = (float(end) for end in np.quantile(resampled, [0.025, 0.975]))
    low = value if 0 < low - value < _ROUNDING else low
    return {"value": value, "low": low, "high": value if 0 < value - high < _ROUNDING else high}


@dataclass(frozen=True)
class Strata:
    """The classes that occur, and how images are drawn within them.

    A class of n > 1 images is drawn n - 1 times, and each draw weighs n / (n - 1): the counts stay, and the variance
    is that of an unbiased estimate, where n draws of weight 1 would make it too small by (n - 1) / n.
    Source: Rao and Wu, Resampling inference with complex survey data, JASA 83 (1988), 231-241.

    Attributes:
        classes: Indices of the C classes that occur, ascending, (C,).
        images: Images of each of them, (C,).
        draws: Draws from each of them in one resample, (C,); their sum is D.
        order: All images by class, (N,).
    """

    classes: np.ndarray
    images: np.ndarray
    draws: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> "Strata":
        """The strata of labels (N,)."""
        classes, images = np.unique(labels, return_counts=True)
        return cls(classes, images, np.maximum(images - 1, 1), np.argsort(labels, kind="stable"))

    @property
    def weights(self) -> np.ndarray:
        """Weight of each draw, (D,)."""
        return np.repeat(self.images / self.draws, self.draws)

    def draw(self, rng: np.random.Generator, resamples: int) -> np.ndarray:
        """Indices of images, by class, (R, D)."""
        end = np.cumsum(self.images)
        low, high = np.repeat(end - self.images, self.draws), np.repeat(end, self.draws)  # (D,)
        return self.order[rng.integers(low, high, (resamples, len(low)))]


@dataclass(frozen=True)
class Outcomes:
    """What a resample reads of each image.

    Attributes:
        predicted: Most probable class, (N,).
        right: Whether that is the label, (N,).
        losses: Negative log probability of the label, (N,).
        classes: K.
    """

    predicted: np.ndarray
    right: np.ndarray
    losses: np.ndarray
    classes: int

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray) -> "Outcomes":
        """The outcomes of probabilities (N, K) and labels (N,)."""
        predicted = probabilities.argmax(axis=1)
        return cls(predicted, predicted == labels, losses(probabilities, labels), probabilities.shape[1])


def tally_draws(draws: np.ndarray, strata: Strata, outcomes: Outcomes) -> Tally:
    """Count R resamples.

    Args:
        draws: Indices of images, (R, D), from `strata.draw`.
        strata: The classes.
        outcomes: Of all images.

    Returns:
        Weighted counts, each (R, K), which need not be whole numbers.
    """
    resamples, classes, weights = len(draws), outcomes.classes, strata.weights
    right = outcomes.right[draws]  # (R, D)
    starts = np.cumsum(strata.draws) - strata.draws
    recall = np.add.reduceat(right, starts, axis=1, dtype=np.int64) / strata.draws  # (R, C)
    images, hits = np.zeros(classes, np.int64), np.zeros((resamples, classes))
    images[strata.classes], hits[:, strata.classes] = strata.images, recall * strata.images
    row, column = np.nonzero(~right)
    cell = row * classes + outcomes.predicted[draws[row, column]]
    false_positives = np.bincount(cell, weights[column], resamples * classes).reshape(resamples, classes)
    loss = (outcomes.losses[draws] * weights).sum(axis=1) / len(outcomes.losses)  # (R,)
    return Tally(images=images, hits=hits, predicted=hits + false_positives, loss=loss)


def chunk(shape: tuple[int, ...]) -> int:
    """Resamples to draw at once of probabilities of a shape (N, K)."""
    return max(1, _NUMBERS_AT_ONCE // max(shape))


def _resamples(probabilities: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Iterator[Tally]:
    strata, outcomes = Strata.of(labels), Outcomes.of(probabilities, labels)
    at_once = chunk(probabilities.shape)
    for start in range(0, RESAMPLES, at_once):
        draws = strata.draw(rng, min(at_once, RESAMPLES - start))
        yield tally_draws(draws, strata, outcomes)
