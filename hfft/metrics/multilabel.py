"""Metrics where an image has any number of labels, each predicted by itself; their intervals and differences.

Labels are (N, K) of 0 and 1; an image is given those whose probability is 0.5 or more, unless the caller says which.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hfft.metrics.calibration import calibration
from hfft.metrics.intervals import LEAST_WRONG, Interval, Z, interval_of, mean_loss, share, too_few
from hfft.metrics.metrics import METRICS, MetricFunction, area_under_roc, by_name, finite, mean_or_nan
from hfft.metrics.paired_tests import f1_slopes, summed
from hfft.metrics.probabilities import LABEL_THRESHOLD, log_odds, logit_losses, sigmoid

_RESAMPLES, _LEAST_RESAMPLES, _WORK = 1000, 200, 2**27  # numbers that all resamples look at, in about a second
_NUMBERS_AT_ONCE = 2**20  # in one array of 8-byte numbers; about six are alive at a time
_LEAST_OF_LABEL = 20  # images with it, and without it
_OVER_LABELS = ("mean_average_precision", "macro_f1")


@dataclass(frozen=True)
class LabelTally:
    """What the metrics are computed from: of all images, or of R resamples in a leading dimension."""

    images: np.ndarray  # that have each label, (K,) or (R, K)
    hits: np.ndarray  # of those, the ones that were given it
    predicted: np.ndarray  # images that were given each label
    average_precision: np.ndarray  # NaN where no image has the label
    exact: np.ndarray  # share of images that were given just their labels, () or (R,)
    wrong: np.ndarray  # share of wrong entries among all images and labels
    loss: np.ndarray  # mean negative log probability of an entry, in nats
    is_there: np.ndarray  # labels that the images have, the resampled ones too, (K,)

    @property
    def f1(self) -> np.ndarray:
        """F1 of each label; 0 for one that no image has and none was given, as in scikit-learn."""
        return 2 * self.hits / np.maximum(self.images + self.predicted, 1)


@dataclass(frozen=True)
class LabelOutcomes:
    """What a model says of images, and what is true; logits, as a probability near 1 can't say how sure it is."""

    logits: np.ndarray  # (N, K) float64
    labels: np.ndarray  # (N, K) bool
    predicted: np.ndarray  # labels that each image was given, (N, K) bool

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None) -> "LabelOutcomes":
        """The outcomes of probabilities."""
        given = probabilities >= LABEL_THRESHOLD if predicted is None else predicted
        return cls.of_logits(log_odds(probabilities), labels, given)

    @classmethod
    def of_logits(cls, logits: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None) -> "LabelOutcomes":
        """The same of logits."""
        given = logits >= 0 if predicted is None else predicted
        return cls(logits.astype(np.float64), np.asarray(labels) > 0, np.asarray(given, dtype=bool))

    @property
    def wrong(self) -> np.ndarray:
        """Entries that are not as they should be, (N, K) bool."""
        return self.labels != self.predicted

    @property
    def right(self) -> np.ndarray:
        """Whether an image was given just its labels, (N,) bool."""
        return np.asarray(~self.wrong.any(axis=1))

    @property
    def has_many(self) -> bool:
        """Whether each label that occurs has enough images with and without it to say how well it is recognised."""
        have = self.labels.sum(axis=0)
        fewer = np.minimum(have, len(self.labels) - have)[have > 0]
        return bool(np.all(fewer >= _LEAST_OF_LABEL))

    @property
    def losses(self) -> np.ndarray:
        """Negative log probability of each entry being as it is, in nats, (N, K)."""
        return logit_losses(self.logits, self.labels)

    @property
    def metrics(self) -> dict[str, float]:
        """The headline metrics, as `measure_labels` has them."""
        return {name: float(value) for name, value in measure_labels(self.tally()).items()}

    def tally(self, weights: np.ndarray | None = None) -> LabelTally:
        """Count images as often as weights (R, N) say; each once, without a leading dimension, when None."""
        times = np.ones((1, len(self.labels))) if weights is None else weights.astype(np.float64)
        count = times.sum(axis=1)  # (R,)
        found = LabelTally(
            images=times @ self.labels,
            hits=times @ (self.labels & self.predicted),
            predicted=times @ self.predicted,
            average_precision=_average_precisions(self.logits, self.labels, times),
            exact=times @ self.right / count,
            wrong=times @ self.wrong.mean(axis=1) / count,
            loss=times @ self.losses.mean(axis=1) / count,
            is_there=np.asarray(self.labels.any(axis=0)),
        )
        if weights is not None:
            return found
        return LabelTally(**{name: value if name == "is_there" else value[0] for name, value in vars(found).items()})


def measure_labels(counts: LabelTally) -> dict[str, np.ndarray]:
    """The headline metrics, () or (R,).

    A label that no image has is left out of the mean average precision, and counts in macro F1: as 0 if it was given
    to an image or occurs in none of the images at all; in a resample that lacks it by chance it is left out. Subset
    accuracy is the share of images that are given just their labels, Hamming loss the share of wrong entries.
    """
    is_by_chance = (counts.images + counts.predicted == 0) & counts.is_there
    total = counts.images.sum(axis=-1) + counts.predicted.sum(axis=-1)
    return {
        "mean_average_precision": _mean_of_known(counts.average_precision),
        "macro_f1": _mean_of_known(np.where(is_by_chance, np.nan, counts.f1)),
        "micro_f1": 2 * counts.hits.sum(axis=-1) / np.maximum(total, 1),
        "subset_accuracy": counts.exact,
        "hamming_loss": counts.wrong,
        "log_loss": counts.loss,
    }


def label_details(outcomes: LabelOutcomes) -> dict[str, float]:
    """Metrics without intervals, in the order of metrics.json; one that isn't defined is left out.

    ROC AUC, expected calibration error (`calibration`) and Brier score (the squared distance of a probability from 0
    or 1) are means over the labels; ROC AUC leaves out a label that all images have, or none has.
    """
    counts, total = outcomes.tally(), outcomes.labels.sum()
    found = {
        "weighted_f1": float(np.average(counts.f1, weights=counts.images)) if total else float("nan"),
        "macro_precision": float((counts.hits / np.maximum(counts.predicted, 1)).mean()),
        "macro_recall": float((counts.hits / np.maximum(counts.images, 1)).mean()),
        **_ranked_and_calibrated(outcomes.logits, sigmoid(outcomes.logits), outcomes.labels),
        "labels_per_image": float(total / len(outcomes.labels)),
        "predicted_per_image": float(counts.predicted.sum() / len(outcomes.labels)),
    }
    return finite(found)


def _ranked_and_calibrated(scores: np.ndarray, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    areas = [area_under_roc(scores[:, k], labels[:, k] > 0) for k in range(labels.shape[1])]
    return {
        "roc_auc": mean_or_nan([area for area in areas if area is not None]),
        "expected_calibration_error": calibration(probabilities, labels)["expected_calibration_error"],
        "brier_score": float(np.mean(np.square(probabilities.astype(np.float64) - (labels > 0)))),
    }


LABEL_METRICS = by_name(
    lambda probabilities, labels: LabelOutcomes.of(probabilities, labels).metrics,
    ("mean_average_precision", "macro_f1", "micro_f1", "subset_accuracy", "hamming_loss", "log_loss"),
)


def metrics_of(*, is_multi_label: bool) -> Mapping[str, MetricFunction]:
    """The metrics of a task; the first is what phases are judged by, unless they say otherwise."""
    return LABEL_METRICS if is_multi_label else METRICS


LABEL_DETAILS = by_name(
    lambda probabilities, labels: _ranked_and_calibrated(probabilities, probabilities, labels),
    ("roc_auc", "expected_calibration_error", "brier_score"),
)


def label_intervals(outcomes: LabelOutcomes, values: dict[str, float] | None = None) -> dict[str, Interval]:
    """Every headline metric with its 95 % interval.

    Subset accuracy has the exact interval of a share. Each other share has that of as many images as would vary as
    much, by resamples of the images: 1,000, and fewer, 200 at least, where images times labels are more than 134,217.
    That may be more images than there are only where enough of them are wrong, and for means over the labels where
    each label has enough images with and without it: 20. Log loss is as in `with_intervals`, an image with a wrong
    label being wrong. A label that no image has tells nothing. `values` are the metrics, where they are known already.
    """
    images, wrong = len(outcomes.labels), int(np.sum(~outcomes.right))
    parts = [measure_labels(outcomes.tally(weights)) for weights in _resamples(outcomes.labels.shape)]
    found = {}
    for name, value in (values or outcomes.metrics).items():
        if name == "log_loss":
            found[name] = mean_loss(value, outcomes.losses.mean(axis=1), wrong)
        elif name == "subset_accuracy":
            found[name] = share(value, images)
        elif name == "mean_average_precision" and not outcomes.labels.any():
            found[name] = too_few(value)
        else:
            is_settled = wrong >= LEAST_WRONG and (name not in _OVER_LABELS or outcomes.has_many)
            variance = _error(value, np.concatenate([part[name] for part in parts]))
            alike = value * (1 - value) / variance if variance > 0 else images
            found[name] = share(value, alike if is_settled else min(alike, images))
    return found


def label_differences(first: LabelOutcomes, second: LabelOutcomes) -> dict[str, Interval]:
    """Every headline metric of the second model minus that of the first, with its 95 % interval, as in `differences`.

    The interval of the subset accuracy holds 0 where, and only where, McNemar's exact test has p of 0.05 or more. That
    of the mean average precision comes from resamples, and is None where a label has fewer than 20 images with or
    without it.
    """
    before, after = first.metrics, second.metrics
    value = {name: after[name] - before[name] for name in before}
    images = len(first.labels)
    wrong = int(np.sum(~(first.right & second.right)))
    found = {name: too_few(one) for name, one in value.items()}
    for name, parts in _parts(first, second).items():
        is_settled = np.count_nonzero(parts) >= LEAST_WRONG and (name not in _OVER_LABELS or first.has_many)
        found[name] = summed(parts, np.inf if is_settled else images)
    lost = second.losses.mean(axis=1) - first.losses.mean(axis=1)
    found["log_loss"] = mean_loss(value["log_loss"], lost, wrong)
    if first.has_many and wrong >= LEAST_WRONG:
        name = "mean_average_precision"
        pairs = [
            measure_labels(second.tally(weights))[name] - measure_labels(first.tally(weights))[name]
            for weights in _resamples(first.labels.shape)
        ]
        half = Z * _error(value[name], np.concatenate(pairs)) ** 0.5
        if half > 0:
            found[name] = interval_of(value[name], value[name] - half, value[name] + half)
    return found


def _parts(first: LabelOutcomes, second: LabelOutcomes) -> dict[str, np.ndarray]:
    """What each image adds to a difference, (N,), by metric, where it is a sum over the images."""
    images, classes = first.labels.shape
    has = first.labels.sum(axis=0)  # (K,)
    hits = np.stack([(one.labels & one.predicted).sum(axis=0) for one in (first, second)])  # (2, K)
    taken = np.stack([one.predicted.sum(axis=0) for one in (first, second)])
    more = second.predicted.astype(float) - first.predicted  # (N, K)
    gain, cost = f1_slopes(hits, has, taken)
    all_gain, all_cost = f1_slopes(*(counts.sum(axis=-1, keepdims=True) for counts in (hits, has, taken)))
    return {
        "macro_f1": (more * (gain * first.labels - cost)).sum(axis=1) / classes,
        "micro_f1": (more * (all_gain * first.labels - all_cost)).sum(axis=1),
        "subset_accuracy": (second.right.astype(float) - first.right) / images,
        "hamming_loss": (second.wrong.mean(axis=1) - first.wrong.mean(axis=1)) / images,
    }


def _error(value: float, resampled: np.ndarray) -> float:
    """Mean squared error of a metric, from resamples (R,): its variance, and its bias with few images."""
    return float(np.mean((resampled - value) ** 2))


def _resamples(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """How often each image is drawn, (R, N), some resamples at a time, the same ones at every call."""
    rng, images = np.random.default_rng(0), shape[0]
    resamples = int(np.clip(_WORK // max(np.prod(shape), 1), _LEAST_RESAMPLES, _RESAMPLES))
    at_once = max(1, _NUMBERS_AT_ONCE // max(shape))
    for start in range(0, resamples, at_once):
        yield rng.multinomial(images, np.full(images, 1 / images), size=min(at_once, resamples - start))


def _average_precisions(values: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each label in each resample, (R, K): the sum over distinct values of recall gained times precision."""
    found = np.full((len(weights), labels.shape[1]), np.nan)
    for label in np.flatnonzero(labels.any(axis=0)):
        order = np.argsort(-values[:, label], kind="stable")
        scores = values[order, label]
        last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of the images with equal values
        drawn = weights[:, order]  # (R, N)
        hits = np.cumsum(drawn * labels[order, label], axis=1)[:, last]  # (R, T)
        taken = np.cumsum(drawn, axis=1)[:, last]
        gained = np.diff(hits, prepend=0, axis=1)
        with np.errstate(invalid="ignore"):  # of a resample without the label
            found[:, label] = (gained * hits / np.maximum(taken, 1)).sum(axis=1) / hits[:, -1]
    return found


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last dimension of what is a number; 0 where nothing is."""
    is_known = ~np.isnan(values)
    return np.where(is_known, values, 0).sum(axis=-1) / np.maximum(is_known.sum(axis=-1), 1)
