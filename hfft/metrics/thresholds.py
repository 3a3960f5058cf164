"""The probability from which an image is given a label: chosen on validation images, kept in config.json.

Thresholds are those of plain probabilities, as transformers' pipelines give them; `at_temperature` moves them to
calibrated ones, by which the same labels are given.
"""

from typing import Any

import numpy as np

from hfft.errors import ModelError
from hfft.model.config import CONFIG_FIELD

FIELD = "label_thresholds"  # of the section of hfft in config.json
DEFAULT = 0.5
_LEAST = 1e-38


def choose_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each label the threshold with the best F1, (K,) float64.

    It is 0.5 where that is as good as any; else it lies halfway between two neighbouring probabilities, so that
    rounding decides nothing, and of equally good places nearest to 0.5. A label that no image has keeps 0.5. The
    fewer images have a label, the more chance there is in its threshold.

    Args:
        probabilities: Of validation images, (N, K).
        labels: Theirs, (N, K) of 0 and 1.
    """
    return np.asarray([_best(probabilities[:, k], labels[:, k] > 0) for k in range(labels.shape[1])])


def at_temperature(thresholds: np.ndarray, temperature: float) -> np.ndarray:
    """Thresholds (K,) of calibrated probabilities that give the same labels."""
    logits = np.log(thresholds) - np.log1p(-thresholds)
    return 1 / (1 + np.exp(-logits / temperature))


def kept_thresholds(config: Any, classes: int) -> np.ndarray:
    """The thresholds in a model's config, (K,); 0.5 for all where it has none.

    Raises:
        ModelError: If they aren't one number between 0 and 1 for each class.
    """
    content = getattr(config, CONFIG_FIELD, None)
    found = content.get(FIELD) if isinstance(content, dict) else None
    if found is None:
        return np.full(classes, DEFAULT)
    is_fine = isinstance(found, list) and len(found) == classes and all(isinstance(one, int | float) for one in found)
    if not is_fine or not all(0 < one < 1 for one in found):
        raise ModelError(
            f"the model's config.json has {CONFIG_FIELD}.{FIELD} {found!r}; allowed: {classes} numbers between 0 and "
            "1, in the order of the outputs; remove the key to take 0.5 for all"
        )
    return np.asarray(found, dtype=np.float64)


def _best(scores: np.ndarray, has: np.ndarray) -> float:
    if not has.any():
        return DEFAULT
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of the images with equal probability
    hits = np.cumsum(has[order])[last]
    f1 = 2 * hits / (last + 1 + has.sum())  # (T,)
    upper, lower = ranked[last], np.append(ranked[last[1:]], 0.0)
    places = np.where((lower < DEFAULT) & (upper >= DEFAULT), DEFAULT, (upper + lower) / 2)
    best = np.flatnonzero(f1 == f1.max())
    chosen = places[best[np.argmin(np.abs(places[best] - DEFAULT))]]
    return float(max(chosen, _LEAST))
