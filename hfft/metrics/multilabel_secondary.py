"""More about multi-label predictions: metrics without intervals, scores and calibration of each label."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hfft.metrics.calibration import calibration_bins
from hfft.metrics.multilabel import SetOutcomes, sigmoid
from hfft.metrics.per_class import share_rows
from hfft.metrics.secondary import area_under_roc


def set_details(outcomes: SetOutcomes) -> dict[str, float]:
    """All that is defined for these images: the area under the ROC curve needs a label that some images lack."""
    counts = outcomes.tally()
    f1 = 2 * counts.hits / np.maximum(counts.images + counts.predicted, 1)  # (K,)
    precision, recall = counts.hits / np.maximum(counts.predicted, 1), counts.hits / np.maximum(counts.images, 1)
    total, shares = counts.images.sum(), sigmoid(outcomes.logits)
    found = {
        "weighted_f1": float(np.average(f1, weights=counts.images)) if total else float("nan"),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "roc_auc": roc_auc(outcomes.logits, outcomes.labels),
        "expected_calibration_error": expected_calibration_error(shares, outcomes.labels),
        "brier_score": brier_score(shares, outcomes.labels),
        "labels_per_image": float(total / len(outcomes.labels)),
        "predicted_per_image": float(counts.predicted.sum() / len(outcomes.labels)),
    }
    return {name: value for name, value in found.items() if np.isfinite(value)}


def roc_auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels of the area under the ROC curve; one that all images have, or none has, is left out."""
    areas = [area_under_roc(probabilities[:, k], labels[:, k] > 0) for k in range(labels.shape[1])]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else float("nan")


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels of how far their probability is from how often images have them; see `set_calibration`."""
    return set_calibration(probabilities, labels)["expected_calibration_error"]


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images and labels of the squared distance of the probability from 0 or 1."""
    return float(np.mean(np.square(probabilities.astype(np.float64) - (labels > 0))))


SET_DETAILS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "roc_auc": roc_auc,
    "expected_calibration_error": expected_calibration_error,
    "brier_score": brier_score,
}


def set_calibration(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> dict[str, Any]:
    """Compare the probability of a label with how often images have it.

    Args:
        probabilities: (N, K), N > 0.
        labels: (N, K) of 0 and 1.
        bins: How many.

    Returns:
        `expected_calibration_error`, the mean over the labels of each one's, and `bins` of all labels together, as in
        `calibration`: `images` counts pairs of image and label, and `accuracy` is the share of images that have it.
    """
    has = labels > 0
    errors = [calibration_bins(probabilities[:, k], has[:, k], bins)[0] for k in range(labels.shape[1])]
    _, together = calibration_bins(probabilities.ravel(), has.ravel(), bins)
    return {"expected_calibration_error": float(np.mean(errors)), "bins": together}


def set_scores(outcomes: SetOutcomes, thresholds: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of each label as in `class_scores`, with its average precision and threshold.

    Args:
        outcomes: What was predicted.
        thresholds: Of each label, (K,).
        classes: Their names.
    """
    counts = outcomes.tally()
    right, images, taken = (part.astype(int) for part in (counts.hits, counts.images, counts.predicted))
    table = share_rows(right, images, taken, classes)
    precisions = counts.average_precision
    return {
        name: {
            **row,
            "average_precision": None if np.isnan(precisions[k]) else float(precisions[k]),
            "threshold": float(thresholds[k]),
        }
        for k, (name, row) in enumerate(table.items())
    }
