"""Metrics where an image has any number of labels, each predicted by itself.

Every metric takes probabilities (N, K), each from 0 to 1, and labels (N, K) of 0 and 1. An image is given the labels
whose probability is 0.5 or more, unless the caller says which; `measure_sets` has the formulas, which work on counts
so that intervals can apply them to many resamples at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hfft.evaluation.intervals import RESAMPLES, chunk, interval
from hfft.evaluation.metrics import softmax

_LEAST_RESAMPLES, _WORK = 200, 2**27  # numbers that all resamples look at, in about a second
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class SetTally:
    """What the metrics are computed from: of one set of images, or of R resamples in a leading dimension.

    Attributes:
        images: Images that have each label, (K,) or (R, K).
        hits: Of those, the ones that were given it.
        predicted: Images that were given each label.
        average_precision: Of each label, NaN where no image has it.
        exact: Share of images that were given just their labels, () or (R,).
        wrong: Share of wrong entries among all images and labels.
        loss: Mean negative log probability of an entry, in nats.
        is_there: Labels that the images have, the resampled ones too, (K,).
    """

    images: np.ndarray
    hits: np.ndarray
    predicted: np.ndarray
    average_precision: np.ndarray
    exact: np.ndarray
    wrong: np.ndarray
    loss: np.ndarray
    is_there: np.ndarray


@dataclass(frozen=True)
class SetOutcomes:
    """What a model says of images, and what is true.

    Attributes:
        probabilities: (N, K).
        labels: (N, K) of 0 and 1.
        predicted: Labels that each image was given, (N, K) bool.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None) -> "SetOutcomes":
        """The outcomes, by a threshold of 0.5 where it isn't said what was predicted."""
        given = probabilities >= 0.5 if predicted is None else predicted
        return cls(probabilities, np.asarray(labels) > 0, np.asarray(given, dtype=bool))

    def tally(self, weights: np.ndarray | None = None) -> SetTally:
        """Count images as often as weights (R, N) say; each once, without a leading dimension, when None."""
        times = np.ones((1, len(self.labels))) if weights is None else weights.astype(np.float64)
        count = times.sum(axis=1)  # (R,)
        wrong = self.labels != self.predicted  # (N, K)
        found = SetTally(
            images=times @ self.labels,
            hits=times @ (self.labels & self.predicted),
            predicted=times @ self.predicted,
            average_precision=_average_precisions(self.probabilities, self.labels, times),
            exact=times @ ~wrong.any(axis=1) / count,
            wrong=times @ wrong.mean(axis=1) / count,
            loss=times @ entry_losses(self.probabilities, self.labels).mean(axis=1) / count,
            is_there=np.asarray(self.labels.any(axis=0)),
        )
        if weights is not None:
            return found
        return SetTally(**{name: value if name == "is_there" else value[0] for name, value in vars(found).items()})


def measure_sets(counts: SetTally) -> dict[str, np.ndarray]:
    """Every metric, () or (R,).

    A label that no image has is left out of the mean average precision, and counts in macro F1: as 0 if it was given
    to an image or occurs in none of the images at all; in a resample that lacks it by chance it is left out.
    """
    f1 = 2 * counts.hits / np.maximum(counts.images + counts.predicted, 1)  # (..., K)
    is_by_chance = (counts.images + counts.predicted == 0) & counts.is_there
    total = counts.images.sum(axis=-1) + counts.predicted.sum(axis=-1)
    return {
        "mean_average_precision": _mean_of_known(counts.average_precision),
        "macro_f1": _mean_of_known(np.where(is_by_chance, np.nan, f1)),
        "micro_f1": 2 * counts.hits.sum(axis=-1) / np.maximum(total, 1),
        "subset_accuracy": counts.exact,
        "hamming_loss": counts.wrong,
        "log_loss": counts.loss,
    }


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K) in float32, each label by itself."""
    values = logits.astype(np.float64)
    return np.exp(-np.logaddexp(0, -values)).astype(np.float32)


def to_probabilities(logits: np.ndarray, *, is_multi_label: bool) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K) in float32: of one class among all, or of each label by itself."""
    return sigmoid(logits) if is_multi_label else softmax(logits)


def entry_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log probability of each label being as it is, in nats, (N, K); at most 87.3, as in metrics.losses."""
    values = probabilities.astype(np.float64)
    return -np.log(np.maximum(np.where(labels, values, 1 - values), _TINY))


def mean_average_precision(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels of the average precision, as scikit-learn has it; a label of no image is left out."""
    return _measured(probabilities, labels, "mean_average_precision")


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of all K labels; one that no image has and none was given counts as 0, as in scikit-learn."""
    return _measured(probabilities, labels, "macro_f1")


def micro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all images and labels counted together."""
    return _measured(probabilities, labels, "micro_f1")


def subset_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that are given just their labels, no more and no fewer."""
    return _measured(probabilities, labels, "subset_accuracy")


def hamming_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong entries among all images and labels."""
    return _measured(probabilities, labels, "hamming_loss")


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images and labels of the negative log probability that the label is as it is, in nats."""
    return float(entry_losses(probabilities, np.asarray(labels) > 0).mean())


SET_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean_average_precision": mean_average_precision,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "subset_accuracy": subset_accuracy,
    "hamming_loss": hamming_loss,
    "log_loss": log_loss,
}


def sets_with_intervals(
    probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Every metric with the 2.5 % and 97.5 % quantiles over resamples of the images, drawn with replacement.

    There are 1,000 resamples; fewer, 200 at least, where images times labels are more than 134,217. A resample may
    lack a rare label, which then counts in no mean.

    Args:
        probabilities: (N, K), N > 0.
        labels: (N, K) of 0 and 1.
        predicted: Labels that each image was given, (N, K) bool; by a threshold of 0.5 when None.
        seed: Seeds the resampling.

    Returns:
        Metric name to `value`, `low` and `high`.
    """
    outcomes = SetOutcomes.of(probabilities, labels, predicted)
    parts = [measure_sets(outcomes.tally(weights)) for weights in _resamples(labels.shape, seed)]
    return {
        name: interval(float(value), np.concatenate([part[name] for part in parts]))
        for name, value in measure_sets(outcomes.tally()).items()
    }


def set_differences(first: SetOutcomes, second: SetOutcomes, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Every metric of the second model minus that of the first, with its 95 % interval, from common resamples.

    Args:
        first: Of the first model.
        second: Of the second, on the same images.
        seed: Seeds the resampling.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for weights in _resamples(first.labels.shape, seed):
        one, other = (measure_sets(outcome.tally(weights)) for outcome in (first, second))
        for name in one:
            parts.setdefault(name, []).append(other[name] - one[name])
    before, after = (measure_sets(outcome.tally()) for outcome in (first, second))
    return {name: interval(float(after[name] - before[name]), np.concatenate(found)) for name, found in parts.items()}


def _measured(probabilities: np.ndarray, labels: np.ndarray, name: str) -> float:
    return float(measure_sets(SetOutcomes.of(probabilities, labels).tally())[name])


def _resamples(shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (R, N), some resamples at a time."""
    rng, images = np.random.default_rng(seed), shape[0]
    resamples = int(np.clip(_WORK // max(np.prod(shape), 1), _LEAST_RESAMPLES, RESAMPLES))
    at_once = chunk(shape)
    for start in range(0, resamples, at_once):
        yield rng.multinomial(images, np.full(images, 1 / images), size=min(at_once, resamples - start))


def _average_precisions(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each label in each resample, (R, K): the sum over distinct probabilities of recall gained times precision."""
    found = np.full((len(weights), labels.shape[1]), np.nan)
    for label in np.flatnonzero(labels.any(axis=0)):
        order = np.argsort(-probabilities[:, label], kind="stable")
        scores = probabilities[order, label]
        last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of the images with equal probability
        drawn = weights[:, order]  # (R, N)
        hits = np.cumsum(drawn * labels[order, label], axis=1)[:, last]  # (R, T)
        taken = np.cumsum(drawn, axis=1)[:, last]
        gained = np.diff(hits, prepend=0, axis=1)
        with np.errstate(invalid="ignore"):  # of a resample without the label
            found[:, label] = (gained * hits / np.maximum(taken, 1)).sum(axis=1) / hits[:, -1]
    return found


def average_precisions(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each label, (K,); NaN where no image has it."""
    return SetOutcomes.of(probabilities, labels).tally().average_precision


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last dimension of what is a number; 0 where nothing is."""
    is_known = ~np.isnan(values)
    return np.where(is_known, values, 0).sum(axis=-1) / np.maximum(is_known.sum(axis=-1), 1)
