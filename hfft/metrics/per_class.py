"""What predictions say of each class: precision, recall and F1 with intervals, and which class is taken for which."""

from collections.abc import Sequence

import numpy as np

from hfft.metrics.bootstrap import wilson_ends


def class_scores(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each class, with the ends of their 95 % intervals.

    The intervals are Wilson's for shares of images: of those of the class (recall), of those that were taken for it
    (precision). F1 is 2 J / (1 + J), where J is the share of right ones among the images that are of the class or were
    taken for it, and its interval is that of J.
    Sources: Wilson, JASA 22 (1927), 209-212; Hand et al., F*: an interpretable transformation of the F-measure,
    https://arxiv.org/abs/2008.00103.

    Args:
        predicted: Class index that each image was given, (N,).
        labels: Class index of each image, (N,).
        classes: Class names.

    Returns:
        Class name to `precision`, `recall` and `f1`, each with `_low` and `_high`, and `images` of the class and
        `predicted` images. Without images, or predictions, a share is 0 and its interval reaches from 0 to 1.
    """
    right = np.bincount(labels[predicted == labels], minlength=len(classes))
    images, taken = np.bincount(labels, minlength=len(classes)), np.bincount(predicted, minlength=len(classes))
    return share_rows(right, images, taken, classes)


def share_rows(
    right: np.ndarray, images: np.ndarray, taken: np.ndarray, classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The rows of `class_scores`, from counts.

    Args:
        right: Images of each class that were taken for it, (K,).
        images: Images of each class, (K,).
        taken: Images that were taken for each class, (K,).
        classes: Class names.
    """
    either = images + taken - right
    table = {}
    for number, name in enumerate(classes):
        hits = int(right[number])
        jaccard = wilson(hits, int(either[number]))
        shares = {
            "precision": wilson(hits, int(taken[number])),
            "recall": wilson(hits, int(images[number])),
            "f1": (2 * hits / max(int(images[number] + taken[number]), 1), *(2 * j / (1 + j) for j in jaccard[1:])),
        }
        named = {
            f"{share}{ending}": value
            for share, values in shares.items()
            for ending, value in zip(("", "_low", "_high"), values, strict=True)
        }
        table[name] = {**named, "images": int(images[number]), "predicted": int(taken[number])}
    return table


def wilson(hits: int, trials: int) -> tuple[float, float, float]:
    """A share and the ends of its 95 % interval; 0, 0 and 1 where nothing was tried."""
    if trials == 0:
        return 0.0, 0.0, 1.0
    low, high = wilson_ends(np.array(hits), np.array(trials))
    return hits / trials, float(low), float(high)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Class name to the class names that its images were given, and how many were; those that are 0 left out.

    Args:
        predicted: Class index that each image was given, (N,).
        labels: Class index of each image, (N,).
        classes: Class names.
    """
    pairs, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)  # (2, P), (P,)
    found: dict[str, dict[str, int]] = {name: {} for name in classes}
    for (label, given), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        found[classes[int(label)]][classes[int(given)]] = count
    return found
