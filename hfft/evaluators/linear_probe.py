"""A linear probe: logistic regression on recorded features, with the weight decay that does best over folds."""

from functools import partial

import numpy as np
import torch

from hfft.metrics.probabilities import log_loss, to_probabilities
from hfft.training.logistic import head_path, held_out_logits
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

    solve = partial(head_path, classes=classes, loss=loss)
    count = int(np.clip(_WORK / (features.shape[1] * classes), _LEAST, _SAMPLE))
    sample = np.random.default_rng(seed).permutation(len(labels))[:count]
    folds = torch.arange(len(sample)) % _FOLDS
    whole = partial(solve, weight_decays=_WEIGHT_DECAYS)
    tried = held_out_logits([features[sample]], targets[sample], folds, whole).numpy()  # (W, N, K)
    shares = [to_probabilities(logits, is_multi_label=is_multi_label) for logits in tried]
    best = int(np.argmin([log_loss(one, labels[sample]) for one in shares]))
    *_, head = solve(features, targets, weight_decays=_WEIGHT_DECAYS[: best + 1])
    return head.logits(asked).numpy()
