"""How far probabilities can be believed: accuracy beside confidence, and expected calibration error."""

from typing import Any

import numpy as np

_BINS = 10


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compare the probability of the predicted class with how often that class is right.

    Images are put into 10 bins of equal width by the probability of their predicted class. The expected calibration
    error is the mean distance between a bin's accuracy and its mean probability, weighted by images.
    Source: Guo et al., https://hf.co/papers/1706.04599.

    Args:
        probabilities: (N, K), N > 0.
        labels: Class index of each image, (N,).

    Returns:
        `expected_calibration_error`, and `bins` that hold images, in ascending order: the `low` and `high` end of
        each, its `images`, their mean `confidence` and their `accuracy`.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)  # a bin holds its upper end
    bins = []
    for place in np.unique(places).tolist():
        chosen = places == place
        bins.append(
            {
                "low": place / _BINS,
                "high": (place + 1) / _BINS,
                "images": int(chosen.sum()),
                "confidence": float(confidence[chosen].mean()),
                "accuracy": float(right[chosen].mean()),
            }
        )
    error = sum(part["images"] * abs(part["accuracy"] - part["confidence"]) for part in bins) / len(labels)
    return {"expected_calibration_error": float(error), "bins": bins}
