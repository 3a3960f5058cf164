"""How far probabilities can be believed: accuracy beside confidence, and expected calibration error."""

from typing import Any

import numpy as np

_BINS = 10


def calibration(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = _BINS) -> dict[str, Any]:
    """Compare the probability of the predicted class with how often that class is right.

    Images are put into bins of equal width by the probability of their predicted class. The expected calibration
    error is the mean distance between a bin's accuracy and its mean probability, weighted by images.
    Source: Guo et al., https://hf.co/papers/1706.04599.

    Args:
        probabilities: (N, K), N > 0.
        labels: Class index of each image, (N,).
        bins: How many; 10 are enough to look at.

    Returns:
        `expected_calibration_error`, and `bins` that hold images, in ascending order: the `low` and `high` end of
        each, its `images`, their mean `confidence` and their `accuracy`.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    error, found = calibration_bins(confidence, right, bins)
    return {"expected_calibration_error": error, "bins": found}


def calibration_bins(confidence: np.ndarray, right: np.ndarray, bins: int) -> tuple[float, list[dict[str, Any]]]:
    """The expected calibration error of confidences (N,) in what is right or not, (N,) bool, and its bins."""
    confidence = confidence.astype(np.float64)
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # a bin holds its upper end
    found = []
    for place in np.unique(places).tolist():
        chosen = places == place
        found.append(
            {
                "low": place / bins,
                "high": (place + 1) / bins,
                "images": int(chosen.sum()),
                "confidence": float(confidence[chosen].mean()),
                "accuracy": float(right[chosen].mean()),
            }
        )
    error = sum(part["images"] * abs(part["accuracy"] - part["confidence"]) for part in found) / len(right)
    return float(error), found
