"""Metrics where an image has one label, from probabilities (N, K), rows summing to 1, and labels (N,).

`measure` has the headline metrics, `details` those without intervals, `tables` those with a value by class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfft.metrics.calibration import calibration
from hfft.metrics.probabilities import image_losses

MetricFunction = Callable[[np.ndarray, np.ndarray], Any]
"""Probabilities (N, K) and labels, (N,) or (N, K) of 0 and 1 -> a metric."""

_NEARLY_1 = 0.999
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Tally:
    """Images, right predictions and predictions of each class, (K,), and the mean loss in nats."""

    images: np.ndarray
    hits: np.ndarray
    predicted: np.ndarray
    loss: float

    @property
    def f1(self) -> np.ndarray:
        """F1 of each class, (K,); 0 for one that is neither seen nor predicted, as in scikit-learn."""
        return 2 * self.hits / np.maximum(self.images + self.predicted, 1)


def tally(probabilities: np.ndarray, labels: np.ndarray) -> Tally:
    """Count images by their label and their most probable class."""
    return tally_of(probabilities.argmax(axis=1), image_losses(probabilities, labels), labels, probabilities.shape[1])


def tally_of(predicted: np.ndarray, losses: np.ndarray, labels: np.ndarray, classes: int) -> Tally:
    """Count images by label (N,) and most probable class (N,); `losses` are theirs, (N,)."""
    return Tally(
        images=np.bincount(labels, minlength=classes),
        hits=np.bincount(labels[predicted == labels], minlength=classes),
        predicted=np.bincount(predicted, minlength=classes),
        loss=float(losses.mean()),
    )


def measure(counts: Tally) -> dict[str, float]:
    """The headline metrics.

    Balanced accuracy is the mean recall of the classes that have images; macro F1 is the mean of all K classes.
    """
    present = counts.images > 0
    return {
        "accuracy": float(counts.hits.sum() / counts.images.sum()),
        "balanced_accuracy": float(np.mean(counts.hits[present] / counts.images[present])),
        "macro_f1": float(np.mean(counts.f1)),
        "log_loss": counts.loss,
    }


def details(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics without intervals of N > 0 images, in the order of metrics.json; one that isn't defined is left out.

    - top_5_accuracy: the share of images whose label is among the 5 most probable classes; for 6 classes or more;
    - micro_f1: of all images together, which is the accuracy; weighted_f1: classes weigh as much as they have images;
    - cohen_kappa: agreement beyond chance (Cohen, Educational and Psychological Measurement 20 (1960), 37-46);
    - roc_auc, average_precision: means over the classes of each against the rest, as scikit-learn sums them; a class
      without images, or without images of others, is left out;
    - expected_calibration_error: see `calibration`;
    - brier_score: the mean squared distance from a certain right answer, summed over the classes, 0 to 2 (Brier,
      Monthly Weather Review 78 (1950), 1-3).
    """
    counts, images = tally(probabilities, labels), len(labels)
    by_chance = float(np.dot(counts.images / images, counts.predicted / images))
    agreement = counts.hits.sum() / images
    odds = _log_odds(probabilities)
    curves = [curve for k in np.unique(labels) if (curve := _ranking(odds[:, k], labels == k)) is not None]
    squares = np.square(probabilities, dtype=np.float64).sum(axis=1)
    of_label = probabilities[np.arange(images), labels].astype(np.float64)
    found = {
        "top_5_accuracy": top_k_accuracy(probabilities, labels, 5) if probabilities.shape[1] > 5 else float("nan"),
        "micro_f1": float(2 * counts.hits.sum() / (counts.images.sum() + counts.predicted.sum())),
        "weighted_f1": float(np.average(counts.f1, weights=counts.images)),
        "cohen_kappa": float("nan") if by_chance == 1 else float((agreement - by_chance) / (1 - by_chance)),
        "roc_auc": mean_or_nan([_area(*curve) for curve in curves]),
        "average_precision": mean_or_nan([_average_precision(*curve) for curve in curves]),
        "expected_calibration_error": calibration(probabilities, labels)["expected_calibration_error"],
        "brier_score": float(np.mean(squares - 2 * of_label + 1)),
    }
    return finite(found)


def tables(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[Any]]:
    """Images by label (row) and predicted class (column), (K, K), and scores by class, (K,); 0 for a share of none."""
    counts, classes = tally(probabilities, labels), probabilities.shape[1]
    cells = np.bincount(labels * classes + probabilities.argmax(axis=1), minlength=classes**2)
    return {
        "confusion_matrix": cells.reshape(classes, classes).tolist(),
        "precision_by_class": (counts.hits / np.maximum(counts.predicted, 1)).tolist(),
        "recall_by_class": (counts.hits / np.maximum(counts.images, 1)).tolist(),
        "f1_by_class": counts.f1.tolist(),
    }


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of images whose label is among the k most probable classes; of equal ones the first is, as in argmax."""
    chosen = probabilities[np.arange(len(labels)), labels, None]  # (N, 1)
    is_first = np.arange(probabilities.shape[1]) < labels[:, None]  # (N, K)
    before = (probabilities > chosen) | ((probabilities == chosen) & is_first)
    return float(np.mean(before.sum(axis=1) < k))


def area_under_roc(scores: np.ndarray, is_hit: np.ndarray) -> float | None:
    """Area under the ROC curve of scores (N,) for hits (N,) bool; None where all images are hits, or none is."""
    curve = _ranking(scores, is_hit)
    return None if curve is None else _area(*curve)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that are defined."""
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def mean_or_nan(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return float(np.mean(values)) if values else float("nan")


def by_name(
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]], names: Sequence[str]
) -> dict[str, MetricFunction]:
    """Functions of one metric each, NaN where it isn't defined, from a function of several."""

    def one(name: str) -> MetricFunction:
        return lambda probabilities, labels: metrics(probabilities, labels).get(name, float("nan"))

    return {name: one(name) for name in names}


METRICS = by_name(
    lambda probabilities, labels: measure(tally(probabilities, labels)),
    ("accuracy", "balanced_accuracy", "macro_f1", "log_loss"),
)
DETAILS = by_name(
    details,
    (
        *("top_5_accuracy", "micro_f1", "weighted_f1", "cohen_kappa", "roc_auc", "average_precision"),
        *("expected_calibration_error", "brier_score"),
    ),
)
TABLES = by_name(tables, ("confusion_matrix", "precision_by_class", "recall_by_class", "f1_by_class"))


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Of each class against the rest, (N, K): near 1 from the others' probabilities, which tell more digits."""
    shares = np.maximum(probabilities.astype(np.float64), _TINY)
    is_near = shares > _NEARLY_1  # at most one of an image
    others = np.where(is_near, 0, shares).sum(axis=1, keepdims=True)  # (N, 1)
    rest = np.where(is_near, np.minimum(others, 1 - _NEARLY_1), 1 - shares)
    return np.log(np.where(is_near, 1 - rest, shares)) - np.log(rest)


def _ranking(scores: np.ndarray, is_hit: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Hits and misses above each of the distinct scores, (T,); None without hits or misses."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of the images with equal scores
    hits = np.cumsum(is_hit[order])[last]
    misses = last + 1 - hits
    return (hits, misses) if hits[-1] and misses[-1] else None


def _area(hits: np.ndarray, misses: np.ndarray) -> float:
    area = np.sum(np.diff(misses, prepend=0) * (hits + np.concatenate([[0], hits[:-1]])) / 2)
    return float(area / (hits[-1] * misses[-1]))


def _average_precision(hits: np.ndarray, misses: np.ndarray) -> float:
    return np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (hits + misses))
