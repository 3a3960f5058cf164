"""What a result is compared with: the most frequent class, nearest neighbours, and the head phase alone."""

import numpy as np
import torch

NEIGHBOURS = 20  # and the temperature: the protocol of DINO, https://hf.co/papers/2104.14294
_TEMPERATURE = 0.07
_NUMBERS_AT_ONCE = 2**24  # float32, of a matrix of similarities


def shares(labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of each class among some labels, (N,) or (N, K) of 0 and 1: (K,) float32."""
    if labels.ndim == 2:
        return labels.mean(axis=0, dtype=np.float64).astype(np.float32)
    return (np.bincount(labels, minlength=classes) / len(labels)).astype(np.float32)


def majority(labels: np.ndarray, classes: int, images: int) -> np.ndarray:
    """The most frequent class for every image, with the classes' shares as probabilities, (N, K).

    Args:
        labels: Of the training images; multi-label, each has the same shares.
        classes: K.
        images: N.
    """
    return np.tile(shares(labels, classes), (images, 1))


def nearest_neighbours(known: np.ndarray, labels: np.ndarray, asked: np.ndarray, *, classes: int) -> np.ndarray:
    """Classify features by their nearest neighbours: cosine similarity, the nearer the heavier.

    Each of the 20 neighbours votes with exp(similarity / 0.07), as in DINO's protocol. The probabilities are the
    shares of the votes, with one more neighbour that is of each class by its share of the known images: none is 0.

    Args:
        known: Features of the training images, (M, D).
        labels: Of those, (M,), or (M, K) of 0 and 1, where a share of the votes is that of each label.
        asked: Features, (N, D).
        classes: K.

    Returns:
        (N, K) float32.
    """
    near = torch.nn.functional.normalize(torch.from_numpy(known).float(), dim=1)  # (M, D)
    known_labels = torch.from_numpy(labels)
    targets = known_labels if labels.ndim == 2 else torch.nn.functional.one_hot(known_labels, classes)
    targets = targets.float()  # (M, K)
    count = min(NEIGHBOURS, len(known))
    prior = torch.from_numpy(shares(labels, classes))
    found = []
    for part in torch.from_numpy(asked).float().split(max(1, _NUMBERS_AT_ONCE // len(known))):
        similarity, places = (torch.nn.functional.normalize(part, dim=1) @ near.T).topk(count)  # (B, count)
        weights = torch.softmax(similarity / _TEMPERATURE, dim=1)
        votes = torch.einsum("bn,bnk->bk", weights, targets[places])
        found.append((count * votes + prior) / (count + 1))
    return torch.cat(found).numpy()
