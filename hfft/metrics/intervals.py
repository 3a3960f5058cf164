"""95 % intervals of metrics that hold with few images; simulated coverage: scripts/interval_coverage.py.

Shares of images get exact binomial intervals, means over the classes that of a share of as many images as would vary
as much. Resampling is not used: it covers less near 0 and 1, and nothing where all are right.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hfft.metrics.metrics import Tally, measure, tally
from hfft.metrics.probabilities import image_losses

Interval = dict[str, float | None]
"""`value`, and `low` and `high`, which are None where there are too few images to say."""

LEAST_WRONG = 10
"""Fewer wrong answers, which most of a loss is made of, are too few for its interval."""
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
_LEAST_IMAGES = 100  # for the same
_TAIL = 0.025
_PRIOR = 2  # images of average difficulty that each class has more, for its variance


def with_intervals(
    probabilities: np.ndarray, labels: np.ndarray, *, seed: int = 0, values: Mapping[str, float] | None = None
) -> dict[str, Interval]:
    """Every headline metric with its 95 % interval.

    The intervals are conditional on how many images each class has: they say how far a metric would move with other
    images of the same classes in the same numbers, not with another mix of classes.

    - accuracy: the exact interval of a share of N images, `exact_share`;
    - balanced accuracy: that of a share of as many images as would vary as much, and never narrower than the least
      certain class makes it alone;
    - macro F1: likewise, from no more images than balanced accuracy; None with fewer than three images per class;
    - log loss: `skewed_mean`; None with fewer than 100 images or 10 wrong answers.

    `values` are the metrics of the probabilities (N, K), where they are known already. `seed` changes nothing: earlier
    versions resampled by it, and programs of that time still pass it.
    """
    table = ClassTable.of(probabilities, labels)
    found, wrong = values or measure(table), len(labels) - int(table.hits.sum())
    return {
        "accuracy": share(found["accuracy"], len(labels)),
        "balanced_accuracy": table.balanced_accuracy(found["balanced_accuracy"]),
        "macro_f1": table.macro_f1(found["macro_f1"]),
        "log_loss": mean_loss(found["log_loss"], image_losses(probabilities, labels), wrong),
    }


def interval_of(value: float, low: float, high: float) -> Interval:
    """The interval, which holds its value whatever the rounding."""
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def too_few(value: float) -> Interval:
    """No interval, as there are too few images to say."""
    return {"value": value, "low": None, "high": None}


def share(value: float, images: float, *, most: float = 1.0) -> Interval:
    """The interval of a share of images; where it can't be more than `most`, of that."""
    low, high = exact_share(min(value / most, 1.0) * images, images)
    return interval_of(value, low * most, high * most)


def exact_share(hits: float, trials: float) -> tuple[float, float]:
    """Ends of the exact 95 % interval of a share, by the binomial distribution; they need not be whole numbers.

    Wilson's interval covers less for many shares, most of all near 0 and 1.
    Source: Clopper and Pearson, Biometrika 26 (1934), 404-413.
    """
    misses = trials - hits
    low = 0.0 if hits <= 0 else _beta_quantile(hits, misses + 1, _TAIL)
    high = 1.0 if misses <= 0 else _beta_quantile(hits + 1, misses, 1 - _TAIL)
    return low, high


def _beta_quantile(a: float, b: float, level: float) -> float:
    """A quantile of the beta distribution, from its density over the logit, which falls evenly at both sides."""
    spread = (1 / a + 1 / b) ** 0.5
    logits = np.log(a / b) + spread * np.linspace(-40, 40, 4001)
    logs = a * logits - (a + b) * np.logaddexp(0, logits)
    density = np.exp(logs - logs.max())
    mass = np.cumsum(density) - density / 2
    return float(1 / (1 + np.exp(-np.interp(level, mass / density.sum(), logits))))


def wilson(hits: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of Wilson's 95 % intervals of shares, each (C,); 0 and 1 where nothing was tried.

    Source: Wilson, JASA 22 (1927), 209-212.
    """
    tried = np.maximum(trials, 1)
    shares, z2 = hits / tried, Z**2 / tried
    middle = (shares + z2 / 2) / (1 + z2)
    half = Z * np.sqrt(shares * (1 - shares) / tried + z2 / (4 * tried)) / (1 + z2)
    # At the ends of [0, 1] the formula's own ends are 0 and 1, but for rounding.
    return np.where(hits == 0, 0.0, middle - half), np.where(hits == trials, 1.0, middle + half)


def mean_loss(value: float, values: np.ndarray, wrong: int) -> Interval:
    """The interval of a mean of losses (N,), where enough images are wrong to say."""
    return too_few(value) if len(values) < _LEAST_IMAGES or wrong < LEAST_WRONG else skewed_mean(value, values)


def skewed_mean(value: float, values: np.ndarray) -> Interval:
    """The interval of the mean of values (N,) that may be far to one side of most others.

    Source: Hall, On the removal of skewness by transformation, JRSS B 54 (1992), 221-228.
    """
    count, spread = len(values), float(values.std())
    if spread == 0:
        return too_few(value)
    skew = float(np.mean((values - values.mean()) ** 3)) / spread**3
    ends = np.array([Z, -Z]) / count**0.5
    if abs(skew) > 1e-6:
        ends = 3 / skew * (np.cbrt(1 + skew * (ends - skew / (6 * count))) - 1)
    low, high = value - spread * (count / (count - 1)) ** 0.5 * ends
    return interval_of(value, float(low), float(high))


@dataclass(frozen=True)
class ClassTable(Tally):
    """The class (N,) and the predicted class (N,) of each image, and their counts by class."""

    labels: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray) -> "ClassTable":
        """Count the images of probabilities (N, K)."""
        return cls(**vars(tally(probabilities, labels)), labels=labels, answers=probabilities.argmax(axis=1))

    @property
    def present(self) -> np.ndarray:
        """Whether a class has images, (K,) bool."""
        return self.images > 0

    @property
    def has_few(self) -> bool:
        """Whether there are fewer than three images per class: their F1 is not that of many."""
        return len(self.labels) < 3 * int(self.present.sum())

    @property
    def even_images(self) -> float:
        """As many images, evenly from all classes, would tell as much of the mean over the classes."""
        return float(self.present.sum() ** 2 / np.sum(1 / self.images[self.present]))

    @property
    def _typical(self) -> float:
        """A cautious recall of the mean class: as if one more class were found, and another never."""
        recalls = self.hits[self.present] / self.images[self.present]
        return float((recalls.sum() + 1) / (len(recalls) + 2))

    def balanced_accuracy(self, value: float) -> Interval:
        """The interval of the mean recall `value`."""
        count = self._recall_images()
        images, hits = self.images[self.present], self.hits[self.present]
        ends = wilson(hits, images)  # two times (C,)
        down = float(np.max(hits / images - ends[0])) / len(images)
        up = float(np.max(ends[1] - hits / images)) / len(images)
        low, high = exact_share(value * count, count)
        return interval_of(value, max(min(low, value - down), 0.0), min(max(high, value + up), 1.0))

    def macro_f1(self, value: float) -> Interval:
        """The interval of the mean F1 `value`."""
        if self.has_few:
            return too_few(value)
        most = float(self.present.mean())  # classes without images have an F1 of 0, whatever is predicted
        return share(value, min(self._f1_images(), self._recall_images()), most=most)

    def _recall_images(self) -> float:
        """As many images would vary as much as the mean recall does."""
        images = self.images[self.present]
        recalls = (self.hits[self.present] + _PRIOR * self._typical) / (images + _PRIOR)
        variance = np.sum(recalls * (1 - recalls) / images) / len(images) ** 2
        mean = recalls.mean()
        return min(float(mean * (1 - mean) / variance), self.even_images)

    def _f1_images(self) -> float:
        """As many images would vary as much as the mean F1 does, to first order.

        Each class has a few more images of average difficulty, so that one that is all right is not taken for sure.
        """
        classes, own = len(self.images), self._typical
        other = (1 - own) / max(classes - 1, 1)
        weights = self.images / (self.images + _PRIOR)  # (K,)
        columns = np.bincount(self.answers, weights[self.labels], classes)
        columns += _PRIOR * (other * (weights.sum() - weights) + own * weights)  # images taken for each class
        hits = weights * (self.hits + _PRIOR * own)
        sums = np.maximum(self.images + columns, 1e-12)
        f1 = 2 * hits / sums
        slope = -f1 / sums  # of being taken for a class
        gain = 2 / sums  # more where that is the own one
        means = self._row_means(slope, gain, other)
        squares = self._row_means(slope**2, (slope + gain) ** 2 - slope**2, other)
        variance = np.sum((self.images * (squares - means**2))[self.present]) / self.present.sum() ** 2
        mean = float(f1[self.present].mean())
        return mean * (1 - mean) / max(float(variance), 1e-12)

    def _row_means(self, of_column: np.ndarray, of_hit: np.ndarray, other: float) -> np.ndarray:
        """Mean over the images of each class of a number (K,) of the class they were taken for, more where right."""
        counted = np.bincount(self.labels, of_column[self.answers], len(self.images)) + self.hits * of_hit
        average = other * (of_column.sum() - of_column) + self._typical * (of_column + of_hit)
        return (counted + _PRIOR * average) / (self.images + _PRIOR)
