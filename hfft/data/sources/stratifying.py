"""Images with several labels each -> parts in which every label has its share: iterative stratification.

Source: Sechidis et al., On the stratification of multi-label data, ECML PKDD 2011. The label with the fewest images
left is shared out first, image by image, to the part that lacks it most.
"""

from collections.abc import Mapping

import numpy as np


def carve_sets(labels: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Places of the rows that each split takes; what is left is `train`.

    One split is carved after the other, so that the first doesn't depend on the size of the second. Each takes at
    least one image of a label that can spare it, and train is left with one, as far as the other labels of the images
    allow it.

    Args:
        labels: Which labels each image has, (N, K) of 0 and 1.
        fractions: Split name to its share of the images.
        seed: Decides between images that would do as well.
    """
    rest = np.arange(len(labels))
    taken: dict[str, np.ndarray] = {}
    for number, (name, fraction) in enumerate(fractions.items()):
        counts = labels[rest].sum(axis=0, dtype=int)  # (K,)
        wanted = np.clip(np.round(fraction * labels.sum(axis=0)), 1, np.maximum(counts - 1, 0))
        share = min(fraction * len(labels) / len(rest), 1.0)
        targets = np.stack([counts - wanted, wanted])
        parts = assign_sets(labels[rest], targets, np.asarray([1 - share, share]), seed + number)
        parts[_kept_back(labels[rest], parts)] = 0
        taken[name], rest = rest[parts == 1], rest[parts == 0]
    return {"train": rest, **taken}


def assign_sets(labels: np.ndarray, targets: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Number of the part of each image, (N,).

    Args:
        labels: (N, K) of 0 and 1.
        targets: Images of each label that each part is to have, (P, K).
        shares: Of the images that each part is to have, (P,); they sum to 1.
        seed: Decides between images and parts that would do as well.
    """
    rng = np.random.default_rng(seed)
    lacking, room = targets.astype(float), shares * len(labels)  # (P, K), (P,)
    parts = np.full(len(labels), -1)
    left = labels.sum(axis=0, dtype=int)  # images of each label that are in no part yet
    present = labels.astype(bool)
    while left.any():
        label = int(np.argmin(np.where(left > 0, left, np.iinfo(int).max)))
        for row in rng.permutation(np.flatnonzero(present[:, label] & (parts < 0))).tolist():
            part = _neediest(lacking[:, label], room, rng)
            parts[row] = part
            lacking[part] -= labels[row]
            room[part] -= 1
            left -= labels[row]
    for row in rng.permutation(np.flatnonzero(parts < 0)).tolist():  # images of none of the labels
        part = _neediest(room, room, rng)
        parts[row] = part
        room[part] -= 1
    return parts


def _neediest(lacking: np.ndarray, room: np.ndarray, rng: np.random.Generator) -> int:
    """The part that lacks most of a label; of equals the one with most room, and of those any."""
    most = np.flatnonzero(lacking == lacking.max())
    most = most[room[most] == room[most].max()]
    return int(most[0] if len(most) == 1 else rng.choice(most))


def _kept_back(labels: np.ndarray, parts: np.ndarray) -> list[int]:
    """Images that have to stay in part 0, as it would have none of a label otherwise."""
    lost = np.flatnonzero(labels.any(axis=0) & ~labels[parts == 0].any(axis=0))
    return [int(np.flatnonzero(labels[:, label])[0]) for label in lost]
