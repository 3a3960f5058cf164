"""How far probabilities can be trusted: expected calibration error, and the temperature that lowers it.

Source: Guo et al., https://hf.co/papers/1706.04599. Log probabilities stand for logits, which differ by a constant.
"""

import math
from typing import Any

import numpy as np

from hfft.metrics.probabilities import logs, sigmoid, softmax64

_COLDEST, _HOTTEST = 0.05, 20.0


def calibration(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> dict[str, Any]:
    """Compare probabilities (N, K) of N > 0 images with how often they are right, in bins of equal width.

    With one label per image (N,) it is the probability of the predicted class. With any number (N, K) it is that of
    each label, compared with the share of images that have it; the error is then the mean over the labels, and the
    bins count pairs of image and label.

    Returns:
        `expected_calibration_error`: mean distance between a bin's accuracy and its mean probability, weighted by
        images. `bins` that hold images, ascending: `low` and `high` end, `images`, mean `confidence`, `accuracy`.
    """
    if labels.ndim == 1:
        error, found = _compare(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, bins)
        return {"expected_calibration_error": error, "bins": found}
    has = labels > 0
    errors = [_compare(probabilities[:, k], has[:, k], bins)[0] for k in range(labels.shape[1])]
    _, together = _compare(probabilities.ravel(), has.ravel(), bins)
    return {"expected_calibration_error": float(np.mean(errors)), "bins": together}


def _compare(confidence: np.ndarray, right: np.ndarray, bins: int) -> tuple[float, list[dict[str, Any]]]:
    confidence = confidence.astype(np.float64)
    numbers = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # a bin holds its upper end
    found = []
    for number in np.unique(numbers).tolist():
        chosen = numbers == number
        means = {"confidence": float(confidence[chosen].mean()), "accuracy": float(right[chosen].mean())}
        found.append({"low": number / bins, "high": (number + 1) / bins, "images": int(chosen.sum()), **means})
    error = sum(part["images"] * abs(part["accuracy"] - part["confidence"]) for part in found) / len(right)
    return float(error), found


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The number that logits are divided by for the least log loss of (N, K) for labels (N,), from 0.05 to 20.

    The loss is convex in the inverse of the temperature: Newton's steps, held within bounds that close in. It is 1
    where every answer is right, as the loss would fall all the way to a temperature of 0.
    """
    if np.all(probabilities.argmax(axis=1) == labels):
        return 1.0
    logits = logs(probabilities)
    wanted = logits[np.arange(len(labels)), labels].mean()
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    inverse = 1.0
    for _ in range(60):
        shares = softmax64(logits * inverse)
        mean = (shares * logits).sum(axis=1)
        slope = mean.mean() - wanted
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        bend = ((shares * logits**2).sum(axis=1) - mean**2).mean()
        step = inverse - slope / bend if bend > 0 else math.nan
        step = step if low < step < high else math.sqrt(low * high)
        if abs(step - inverse) <= 1e-9 * inverse:
            break
        inverse = step
    return float(1 / inverse)


def calibrated(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, K) at a temperature, float64; the order within an image stays."""
    return softmax64(logs(probabilities) / temperature)


def yes_and_no(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of labels (N, K) as probabilities of no and yes, (N * K, 2), and which is right, (N * K,)."""
    flat = logits.ravel()
    return np.stack([sigmoid(-flat), sigmoid(flat)], axis=1), (labels.ravel() > 0).astype(np.int64)
