"""Logits, probabilities and their log losses: of one class among all, and of each label by itself."""

import numpy as np

LABEL_THRESHOLD = 0.5
"""The probability from which a label is given where none was chosen."""

_TINY = np.finfo(np.float32).tiny


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K) in float32."""
    return softmax64(logits.astype(np.float64)).astype(np.float32)


def softmax64(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) float64 -> probabilities (N, K) float64."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K) in float64, each label by itself."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def to_probabilities(logits: np.ndarray, *, is_multi_label: bool) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K): of one class among all, float32, or of each label by itself, float64."""
    return sigmoid(logits) if is_multi_label else softmax(logits)


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities of labels (N, K) -> logits (N, K) in float64.

    A probability of 1 is one that was rounded to it: the logit is 17 in float32, and 37 in float64; that of 0 is -87.
    """
    step = np.finfo(probabilities.dtype if probabilities.dtype.kind == "f" else np.float64).epsneg
    values = probabilities.astype(np.float64)
    return np.log(np.maximum(values, _TINY)) - np.log(np.maximum(1 - values, step / 2))


def logs(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms in float64; -87.3 at least, that of float32's smallest number."""
    return np.log(np.maximum(probabilities.astype(np.float64), _TINY))


def image_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log probability of each image's class (N,) in nats, (N,) float64; 87.3 at most."""
    return -logs(probabilities[np.arange(len(labels)), labels])


def logit_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log probability of each label (N, K) of 0 and 1 being as it is, in nats, (N, K), from logits (N, K)."""
    return np.logaddexp(0, np.where(labels > 0, -logits, logits))


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability in nats: of each image's class (N,), or of each label being as it is (N, K)."""
    if labels.ndim == 1:
        return float(image_losses(probabilities, labels).mean())
    return float(logit_losses(log_odds(probabilities), labels).mean())
