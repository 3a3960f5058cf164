"""How alike two sets of features, or two sets of answers, are: of the same images, before and after training."""

import numpy as np

_NEIGHBOURS = 10


def linear_cka(before: np.ndarray, after: np.ndarray) -> float | None:
    """Centred kernel alignment with a linear kernel.

    It is 1 for features that differ by rotation, scale and shift, and about 0 for unrelated ones. The estimate is the
    unbiased one, which leaves each image's similarity to itself out: the usual one is far above 0 for unrelated
    features of more dimensions than images, and those of most networks are such. It can be a little below 0 by chance.
    Source: https://hf.co/papers/1905.00414; the unbiased estimate: https://hf.co/papers/2010.15327.

    Args:
        before: (N, D).
        after: (N, E).

    Returns:
        None for fewer than 4 images, or where all images have the same features.
    """
    if len(before) < 4:
        return None
    first, second = _kernel(before), _kernel(after)
    scale = _independence(first, first) * _independence(second, second)
    return None if scale <= 0 else float(_independence(first, second) / np.sqrt(scale))


def cosine_drift(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over the images of 1 - cosine between features (N, D) and (N, D); 0 is no change, 2 the opposite."""
    if np.array_equal(before, after):
        return 0.0
    first, second = _unit(before), _unit(after)
    return float(np.mean(1 - np.sum(first * second, axis=1)))


def knn_accuracy(features: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of images whose nearest others, by cosine, have mostly its own label.

    Of N images the 10 nearest others vote, or the square root of N if that is less; of classes with as many votes the
    one with more similar neighbours wins. An image whose class has no other image doesn't count.

    Args:
        features: (N, D).
        labels: Class indices, (N,).

    Returns:
        None where no image counts.
    """
    _, place, images = np.unique(labels, return_inverse=True, return_counts=True)
    counted = images[place] > 1
    if not counted.any():
        return None
    unit = _unit(features)
    cosine = unit @ unit.T  # (N, N)
    np.fill_diagonal(cosine, -np.inf)
    many = min(_NEIGHBOURS, max(round(np.sqrt(len(labels))), 1))
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :many]  # (N, many)
    rows = np.arange(len(labels))[:, None]
    votes = np.zeros((len(labels), len(images)))
    np.add.at(votes, (rows, place[nearest]), 1 + cosine[rows, nearest] / (4 * many))  # a tie-break, below one vote
    return float(np.mean((votes.argmax(axis=1) == place)[counted]))


def agreement(before: np.ndarray, after: np.ndarray) -> float:
    """Share of images for which logits (N, K) and (N, K) have the same class on top."""
    return float(np.mean(before.argmax(axis=1) == after.argmax(axis=1)))


def kl_divergence(before: np.ndarray, after: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the answers after from those before, both as logits (N, K), in nats."""
    first, second = _log_softmax(before), _log_softmax(after)
    return float(max(np.mean(np.sum(np.exp(first) * (first - second), axis=1)), 0.0))  # rounding aside, never below


def _kernel(features: np.ndarray) -> np.ndarray:
    """Products of centred features without those of an image with itself, (N, N) float64."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    kernel = centred @ centred.T
    np.fill_diagonal(kernel, 0)
    return kernel


def _independence(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two kernels without diagonals."""
    count = len(first)
    total = np.sum(first * second)
    total += first.sum() * second.sum() / ((count - 1) * (count - 2))
    total -= 2 / (count - 2) * np.dot(first.sum(axis=0), second.sum(axis=0))
    return float(total / (count * (count - 3)))


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; a row of zeros stays one."""
    values = features.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
