"""Metrics beside the headline ones: computed once per split, without intervals."""

from collections.abc import Callable, Sequence

import numpy as np

from hfft.metrics.calibration import calibration
from hfft.metrics.metrics import Tally, tally

_NEARLY_1 = 0.999
_TINY = np.finfo(np.float32).tiny


def details(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All DETAILS that are defined for these images: ranking metrics need two classes among the labels.

    Args:
        probabilities: (N, K).
        labels: (N,), N > 0.
    """
    found = {name: float(metric(probabilities, labels)) for name, metric in DETAILS.items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def top_5_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose label is among the 5 most probable classes; NaN for 5 classes or fewer."""
    return top_k_accuracy(probabilities, labels, 5) if probabilities.shape[1] > 5 else float("nan")


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of images whose label is among the k most probable classes; of equal ones the first is, as in argmax."""
    chosen = probabilities[np.arange(len(labels)), labels, None]  # (N, 1)
    is_first = np.arange(probabilities.shape[1]) < labels[:, None]  # (N, K)
    before = (probabilities > chosen) | ((probabilities == chosen) & is_first)
    return float(np.mean(before.sum(axis=1) < k))


def micro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all images counted together; where an image has one label it is the accuracy."""
    counts = tally(probabilities, labels)
    return float(2 * counts.hits.sum() / (counts.images.sum() + counts.predicted.sum()))


def weighted_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of the classes, each weighing as much as it has images."""
    counts = tally(probabilities, labels)
    return float(np.average(_f1(counts), weights=counts.images))


def cohen_kappa(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Agreement beyond chance, 1 at most; NaN where all images are of one class and predicted so.

    Source: Cohen, Educational and Psychological Measurement 20 (1960), 37-46.
    """
    counts, images = tally(probabilities, labels), len(labels)
    by_chance = float(np.dot(counts.images / images, counts.predicted / images))
    return float("nan") if by_chance == 1 else float((counts.hits.sum() / images - by_chance) / (1 - by_chance))


def roc_auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the area under the ROC curve of each against the rest; for two classes it is one area.

    A class without images, or without images of others, is left out; NaN where that leaves none.
    """
    odds = _log_odds(probabilities)
    areas = [area_under_roc(odds[:, number], labels == number) for number in np.unique(labels)]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else float("nan")


def area_under_roc(scores: np.ndarray, is_hit: np.ndarray) -> float | None:
    """Area under the ROC curve of scores (N,) for hits (N,) bool; None where all images are hits, or none is."""
    curve = _curve(scores, is_hit)
    if curve is None or curve[0][-1] == 0:
        return None
    hits, misses = curve
    area = np.sum(np.diff(misses, prepend=0) * (hits + np.concatenate([[0], hits[:-1]])) / 2)
    return float(area / (hits[-1] * misses[-1]))


def average_precision(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the average precision of each against the rest, as scikit-learn sums it.

    A class without images, or without images of others, is left out; NaN where that leaves none.
    """
    found = []
    for hits, misses in _curves(probabilities, labels):
        found.append(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (hits + misses)))
    return float(np.mean(found)) if found else float("nan")


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """How far the predicted class's probability is from how often it is right; see `calibration`."""
    return calibration(probabilities, labels)["expected_calibration_error"]


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the probabilities from a certain right answer, summed over the classes: 0 to 2.

    Source: Brier, Monthly Weather Review 78 (1950), 1-3.
    """
    squares = np.square(probabilities, dtype=np.float64).sum(axis=1)
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(np.mean(squares - 2 * chosen + 1))


def confusion_matrix(probabilities: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Images by label (row) and predicted class (column), (K, K)."""
    classes = probabilities.shape[1]
    cells = np.bincount(labels * classes + probabilities.argmax(axis=1), minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def precision_by_class(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of the images predicted to be of each class, the share that is; 0 where there are none, (K,)."""
    counts = tally(probabilities, labels)
    return (counts.hits / np.maximum(counts.predicted, 1)).tolist()


def recall_by_class(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of the images of each class, the share that was predicted so; 0 where there are none, (K,)."""
    counts = tally(probabilities, labels)
    return (counts.hits / np.maximum(counts.images, 1)).tolist()


def f1_by_class(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """F1 of each class; 0 for one that is neither seen nor predicted, (K,)."""
    return _f1(tally(probabilities, labels)).tolist()


DETAILS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "top_5_accuracy": top_5_accuracy,
    "micro_f1": micro_f1,
    "weighted_f1": weighted_f1,
    "cohen_kappa": cohen_kappa,
    "roc_auc": roc_auc,
    "average_precision": average_precision,
    "expected_calibration_error": expected_calibration_error,
    "brier_score": brier_score,
}

TABLES: dict[str, Callable[[np.ndarray, np.ndarray], Sequence[float] | Sequence[Sequence[float]]]] = {
    "confusion_matrix": confusion_matrix,
    "precision_by_class": precision_by_class,
    "recall_by_class": recall_by_class,
    "f1_by_class": f1_by_class,
}


def _f1(counts: Tally) -> np.ndarray:
    return 2 * counts.hits / np.maximum(counts.images + counts.predicted, 1)  # (K,)


def _curves(probabilities: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each class with images and others, the hits and misses above each of its distinct probabilities, (T,)."""
    odds = _log_odds(probabilities)
    curves = [_curve(odds[:, number], labels == number) for number in np.unique(labels)]
    return [curve for curve in curves if curve is not None]


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Of each class against the rest, (N, K): near 1 from the others' probabilities, which tell more digits."""
    shares = np.maximum(probabilities.astype(np.float64), _TINY)
    is_near = shares > _NEARLY_1  # at most one of an image
    others = np.where(is_near, 0, shares).sum(axis=1, keepdims=True)  # (N, 1)
    rest = np.where(is_near, np.minimum(others, 1 - _NEARLY_1), 1 - shares)
    return np.log(np.where(is_near, 1 - rest, shares)) - np.log(rest)


def _curve(scores: np.ndarray, is_hit: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Hits and misses above each of the distinct scores, (T,); None without misses."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of the images with equal scores
    hits = np.cumsum(is_hit[order])[last]
    misses = last + 1 - hits
    return (hits, misses) if misses[-1] else None
