"""Which labels are least believed: out-of-fold probabilities, and confident learning on them.

Source: Northcutt, Jiang and Chuang, https://hf.co/papers/1911.00068. What is compared with an image's label was never
trained on that label: features come from the pretrained network, probabilities from a probe of the other folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

FOLDS = 5
MOST_WORK = 3e10  # images x features x classes; more would take minutes on a CPU
MOST_NUMBERS = 2e8  # images x features; a GiB

_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the weight penalty beside a mean of losses
_SAMPLE = 5000  # images that the strength is chosen on
_STEPS = 40  # of L-BFGS for a fold


@dataclass(frozen=True)
class Hint:
    """An image whose label is not believed.

    Attributes:
        row: Its place among the training images.
        label: Its class as given.
        believed: The class that the probe believes in.
        label_probability: Of the given class.
        believed_probability: Of the other.
    """

    row: int
    label: int
    believed: int
    label_probability: float
    believed_probability: float


def out_of_fold(features: torch.Tensor, labels: np.ndarray, *, classes: int, seed: int) -> np.ndarray:
    """Probabilities of each image by a linear probe of those in other folds, (N, K) float32.

    The probe is logistic regression on standardised features; the strength of its penalty is the one of a few with
    the smallest out-of-fold log loss.

    Args:
        features: (N, D) float32.
        labels: Class indices, (N,).
        classes: How many there are.
        seed: Divides the images into folds, each class evenly.
    """
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.permutation(len(labels))[:_SAMPLE])
    features = (features - features.mean(dim=0)) / features.std(dim=0).clamp(min=1e-6)
    some, targets = features[sample], labels[sample]
    folds = _folds(targets, rng)
    tried = [_probe(some, targets, folds, classes, strength) for strength in _STRENGTHS]
    losses = [-np.log(np.maximum(found[np.arange(len(targets)), targets], 1e-12)).mean() for found in tried]
    best = int(np.argmin(losses))
    if len(sample) == len(labels):
        return tried[best]
    return _probe(features, labels, _folds(labels, rng), classes, _STRENGTHS[best])


def find_hints(probabilities: np.ndarray, labels: np.ndarray) -> list[Hint]:
    """Images that confidently belong to another class than their own, the least believed first.

    A class is confident of an image if its probability reaches the mean that the class has among its own images.
    Hints are the images off the diagonal of the confident joint: of the classes that are confident of them, the most
    probable one is another than theirs, and more probable. They are ordered by the margin between the two.
    Images of classes with fewer than FOLDS of them are not judged.

    Args:
        probabilities: Out-of-fold, (N, K).
        labels: Class indices, (N,).
    """
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    own = probabilities[np.arange(len(labels)), labels]  # (N,)
    sums = np.bincount(labels, weights=own, minlength=len(counts))
    thresholds = np.where(counts >= FOLDS, sums / np.maximum(counts, 1), np.inf)  # (K,)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)  # (N, K)
    believed = confident.argmax(axis=1)
    margins = own - confident.max(axis=1)
    is_hint = (believed != labels) & (confident.max(axis=1) > own) & (counts[labels] >= FOLDS)
    rows = np.flatnonzero(is_hint)
    rows = rows[np.argsort(margins[rows], kind="stable")]
    return [
        Hint(int(row), int(labels[row]), int(believed[row]), float(own[row]), float(confident[row, believed[row]]))
        for row in rows
    ]


def _folds(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The fold of each image, (N,); each class is spread evenly."""
    folds = np.empty(len(labels), np.int64)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def _probe(features: torch.Tensor, labels: np.ndarray, folds: np.ndarray, classes: int, strength: float) -> np.ndarray:
    found = np.zeros((len(labels), classes), np.float32)
    targets = torch.from_numpy(labels).to(features.device)
    for fold in range(FOLDS):
        inside = torch.from_numpy(folds != fold).to(features.device)
        if (folds == fold).any():
            layer = _fit(features[inside], targets[inside], classes, strength)
            with torch.no_grad():
                found[folds == fold] = layer(features[~inside]).softmax(dim=1).cpu().numpy()
    return found


def _fit(features: torch.Tensor, targets: torch.Tensor, classes: int, strength: float) -> nn.Linear:
    """A linear layer at the minimum of cross entropy and penalty, by L-BFGS from zero."""
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(features), targets)
        loss = loss + strength / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def described(hints: Sequence[Hint], files: Sequence[str], classes: Sequence[str]) -> list[dict[str, object]]:
    """Hints as label_hints.json has them, with names in the place of numbers."""
    return [
        {
            "rank": rank,
            "row": hint.row,
            "file": files[hint.row],
            "label": classes[hint.label],
            "label_probability": round(hint.label_probability, 6),
            "believed": classes[hint.believed],
            "believed_probability": round(hint.believed_probability, 6),
        }
        for rank, hint in enumerate(hints, start=1)
    ]
