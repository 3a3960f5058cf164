"""A linear probe: logistic regression on recorded features, with the weight decay that does best over folds."""

from collections.abc import Sequence

import numpy as np
import torch

from hfft.metrics.probabilities import log_loss, to_probabilities
from hfft.system.progress import SOON, bar
from hfft.training.logistic import LinearHead, solve_heads
from hfft.training.losses import ImageLoss, LabelSetLoss

_WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3)
_FOLDS = 5
_SAMPLE, _LEAST = 5000, 1000  # images that the weight decay is chosen on, at most; of many classes fewer,
_WORK = 3e8  # images x features x classes of these


def probe_logits(
    features: torch.Tensor, labels: np.ndarray, asked: torch.Tensor, *, classes: int, seed: int
) -> np.ndarray:
    """Logits (M, K) of features (M, D), by a linear head that is solved on other features (N, D).

    The weight decay is the one with the smallest log loss over five folds of the features that are learned from.

    Args:
        features: To learn from.
        labels: Of these, class indices (N,) or multi-label (N, K) of 0 and 1.
        asked: To answer.
        classes: K.
        seed: Divides the images into folds.
    """
    is_multi_label = labels.ndim == 2
    targets = torch.from_numpy(labels).float() if is_multi_label else torch.from_numpy(labels)
    loss = LabelSetLoss() if is_multi_label else ImageLoss()

    def solve(places: np.ndarray, weight_decays: Sequence[float]) -> list[LinearHead]:
        return solve_heads(features[places], targets[places], classes=classes, weight_decays=weight_decays, loss=loss)

    count = int(np.clip(_WORK / (features.shape[1] * classes), _LEAST, _SAMPLE))
    order = np.random.default_rng(seed).permutation(len(labels))[:count]
    losses = np.zeros(len(_WEIGHT_DECAYS))
    folds = min(_FOLDS, len(order))
    for fold in bar("linear probe", folds, range(folds), unit="folds", delay=SOON):
        is_out = np.arange(len(order)) % _FOLDS == fold
        outside = order[is_out]
        for place, head in enumerate(solve(order[~is_out], _WEIGHT_DECAYS)):
            shares = to_probabilities(head.logits(features[outside]).numpy(), is_multi_label=is_multi_label)
            losses[place] += len(outside) * log_loss(shares, labels[outside])
    best = int(losses.argmin())
    head = solve(np.arange(len(labels)), _WEIGHT_DECAYS[: best + 1])[-1]
    return head.logits(asked).numpy()
