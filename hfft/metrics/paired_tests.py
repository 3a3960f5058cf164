"""Two models on the same images: differences of the metrics with their intervals, and McNemar's test."""

from dataclasses import dataclass

import numpy as np

from hfft.metrics.intervals import ClassTable, Interval, Z, exact_share, interval_of, mean_loss, too_few
from hfft.metrics.metrics import measure
from hfft.metrics.probabilities import image_losses

_HALVINGS = 60


@dataclass(frozen=True)
class McNemar:
    """Images that only one of two models gets right, and the two-sided p value of a split at least as uneven."""

    only_first: int
    only_second: int
    p_value: float


def differences(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, Interval]:
    """Every metric of the second model minus that of the first, of probabilities (N, K), with its 95 % interval.

    What makes an image hard or easy for both cancels out: only images count that the two answer differently. The
    interval of the accuracy holds 0 where, and only where, McNemar's exact test has p of 0.05 or more; those of
    balanced accuracy and macro F1 where such a test does of the images by their weights. Where there are too few
    images to say is as in `with_intervals`; an answer of either model that is wrong counts.
    """
    one, other = (ClassTable.of(shares, labels) for shares in (first, second))
    before, after = measure(one), measure(other)
    value = {name: after[name] - before[name] for name in before}
    right, was_right = other.answers == labels, one.answers == labels
    gained = right.astype(float) - was_right  # (N,)
    weights = 1 / (one.present.sum() * one.images[labels])
    lost = image_losses(second, labels) - image_losses(first, labels)
    hits, taken = np.stack([one.hits, other.hits]), np.stack([one.predicted, other.predicted])
    gain, cost = f1_slopes(hits, one.images, taken)
    parts = (gain[labels] * gained - cost[other.answers] + cost[one.answers]) / len(one.images)
    most = float(one.present.mean())
    return {
        "accuracy": summed(gained / len(labels), len(labels)),
        "balanced_accuracy": summed(gained * weights, one.even_images),
        "macro_f1": too_few(value["macro_f1"]) if one.has_few else summed(parts, one.even_images, most=most),
        "log_loss": mean_loss(value["log_loss"], lost, int(np.sum(~(right & was_right)))),
    }


def f1_slopes(hits: np.ndarray, images: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much the second F1 exceeds the first for each hit more, and falls short for each image taken more, (K,).

    With these slopes the difference is exact: F1 is 2 hits / (images + taken), and they lie between those at either.
    `hits`, and images `taken` for each class, are those of the first and the second model, (2, K).
    """
    sums = np.maximum(images + taken, 1e-12)
    f1 = 2 * hits / sums
    return np.sum(1 / sums, axis=0), (f1[0] / sums[1] + f1[1] / sums[0]) / 2


def summed(parts: np.ndarray, images: float, *, most: float = 1.0) -> Interval:
    """The interval of a difference that is the sum of what single images add to it, each as much as 1 / `images`.

    It is Tango's, with as many images as make the variance that of the sum. Where the images that differ could be
    split as unevenly by chance (by the exact test that is McNemar's where all count the same), it holds 0.
    Source: Tango, Statistics in Medicine 17 (1998), 891-908.
    `parts` (N,) are positive where the second model is better, 0 where both are alike. As many `images`, all counting
    the same, would tell as much. The difference can't exceed `most`.
    """
    if most < 1:
        return {name: end if end is None else end * most for name, end in summed(parts / most, images).items()}
    value, sizes = float(parts.sum()), np.abs(parts)
    total = float(sizes.sum())
    if total == 0:
        return interval_of(value, *_score_limits(0.0, 0.0, images))
    squares = float(np.square(sizes).sum())
    count = min(images, total / squares)
    gained, lost = (total + value) / 2 * count, (total - value) / 2 * count
    low, high = _score_limits(gained, lost, count)
    differing = total**2 / squares
    ends = exact_share(round((total + value) / 2 / total * differing, 9), round(differing, 9))
    return interval_of(value, min(low, 0.0) if ends[0] <= 0.5 else low, max(high, 0.0) if ends[1] >= 0.5 else high)


def _score_limits(gained: float, lost: float, count: float) -> tuple[float, float]:
    """Tango's limits of (gained - lost) / count, by halving."""

    def deviation(difference: float) -> float:
        linear = (2 * count - gained + lost) * difference - gained - lost
        root = max(linear**2 + 8 * count * lost * difference * (1 - difference), 0.0) ** 0.5
        variance = count * ((root - linear) / count / 2 + difference * (1 - difference))
        return (gained - lost - count * difference) / max(variance, 1e-300) ** 0.5

    limits = []
    for end, wanted in ((-1.0, Z), (1.0, -Z)):
        inside, outside = (gained - lost) / count, end
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if abs(deviation(middle)) > abs(wanted):
                outside = middle
            else:
                inside = middle
        limits.append(outside)
    return limits[0], limits[1]


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's exact test of whether two models are right equally often, from whether each is right, (N,) bool.

    Source: McNemar, Psychometrika 12 (1947), 153-157.
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    count, fewer = only_first + only_second, min(only_first, only_second)
    steps = np.arange(fewer)
    ways = np.concatenate([[0.0], np.cumsum(np.log((count - steps) / (steps + 1)))])  # log of count over 0..fewer
    tail = np.exp(ways - count * np.log(2)).sum()
    return McNemar(only_first, only_second, float(min(1.0, 2 * tail)))
