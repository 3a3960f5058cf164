"""What a model's confidence is worth: a temperature, and which answers to believe.

Confidence is the probability of the answer. All that is fitted, the temperature and the thresholds, comes from the
validation images; what it is worth is measured on the test images. Log probabilities stand for logits: a temperature
takes no notice of the constant between them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfft.errors import ModelError
from hfft.metrics.calibration import calibration
from hfft.metrics.metrics import log_loss
from hfft.metrics.multilabel import SetOutcomes, log_odds, sigmoid
from hfft.metrics.thresholds import FIELD, quality
from hfft.model.checkpoint import CONFIG_FIELD, has_many_labels
from hfft.system.files import read_json, write_json

if TYPE_CHECKING:
    from hfft.metrics.scoring import Scores  # and what reads images with it, which a Classifier doesn't need

PRECISIONS = (0.9, 0.95, 0.99)
"""Precisions that a threshold of confidence is kept for."""

_BOUNDS = (0.05, 20.0)
_BINS = 15
_POINTS = 100


@dataclass(frozen=True)
class Threshold:
    """The confidence from which answers are believed, and what that gave on the images that it was chosen on.

    Attributes:
        confidence: Least confidence.
        precision: Share of right answers among those with at least that.
        coverage: Share of images that get such an answer.
    """

    confidence: float
    precision: float
    coverage: float


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The number that logits are divided by for the least log loss, from 0.05 to 20.

    Source: https://hf.co/papers/1706.04599. The loss is convex in the inverse of the temperature; its derivative is
    brought to 0 by Newton's steps, held within bounds that close in.

    Args:
        probabilities: (N, K).
        labels: (N,).

    Returns:
        1 where every answer is right: the loss would fall all the way to a temperature of 0, at which the model is
        sure of everything, and nothing in these images speaks against that.
    """
    if np.all(probabilities.argmax(axis=1) == labels):
        return 1.0
    logits = _logs(probabilities)
    wanted = logits[np.arange(len(labels)), labels].mean()
    low, high = 1 / _BOUNDS[1], 1 / _BOUNDS[0]
    inverse = 1.0
    for _ in range(60):
        shares = _softmax(logits * inverse)
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
    return _softmax(_logs(probabilities) / temperature)


def confidences(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each image's answer, and whether it is right: (N,) float64 and (N,) bool."""
    return probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The share of wrong answers among the most confident ones, as more and more of them are believed.

    Source: https://hf.co/papers/1705.08500.

    Args:
        confidence: (N,).
        right: (N,).

    Returns:
        `coverage` and `risk` at 100 points at most, and `aurc`, the mean risk over all coverages. Answers of equal
        confidence have no order: each counts as wrong as they are on average.
    """
    levels, place, images = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(place, ~right, minlength=len(levels)) / images
    risk = np.cumsum(np.repeat(wrong, images)) / np.arange(1, len(right) + 1)  # (N,)
    shown = np.unique(np.linspace(1, len(right), min(_POINTS, len(right))).round().astype(int))
    return {
        "coverage": [float(count / len(right)) for count in shown],
        "risk": [float(risk[count - 1]) for count in shown],
        "aurc": float(risk.mean()),
    }


def find_threshold(confidence: np.ndarray, right: np.ndarray, precision: float) -> Threshold | None:
    """The least confidence from which the answers are right as often as wanted.

    It lies halfway to the next lower confidence, so that rounding decides nothing.

    Args:
        confidence: (N,).
        right: (N,).
        precision: Wanted share of right answers, below 1.

    Returns:
        None where there is none with at least 1 / (1 - precision) answers, as fewer can't tell.
    """
    levels, first, images = np.unique(-confidence, return_index=False, return_inverse=True, return_counts=True)
    hits = np.cumsum(np.bincount(first, right, minlength=len(levels)))
    answers = np.cumsum(images)
    enough = answers >= round(1 / (1 - precision), 6)
    found = np.flatnonzero((hits / answers >= precision) & enough)
    if not len(found):
        return None
    last = found[-1]
    lower = -levels[last + 1] if last + 1 < len(levels) else 0.0
    least = 0.0 if last + 1 == len(levels) else (-levels[last] + lower) / 2
    return Threshold(float(least), float(hits[last] / answers[last]), float(answers[last] / len(right)))


def describe_confidence(scores: Mapping[str, "Scores"]) -> dict[str, Any] | None:
    """What metrics.json holds under `confidence`.

    Args:
        scores: By split; None is returned without validation images.
    """
    if "validation" not in scores:
        return None
    fitted = scores["validation"]
    if fitted.labels.ndim == 2:
        return _describe_sets(scores, fitted)
    temperature = fit_temperature(fitted.probabilities, fitted.labels)
    believed = {
        name: confidences(calibrated(one.probabilities, temperature), one.labels) for name, one in scores.items()
    }
    measured = "test" if "test" in scores else "validation"
    return {
        "temperature": temperature,
        "fitted_on": {
            "split": "validation",
            "images": len(fitted.labels),
            "wrong": int(np.sum(~believed["validation"][1])),
        },
        "measured_on": measured,
        "before": _quality(scores[measured].probabilities, scores[measured].labels),
        "after": _quality(calibrated(scores[measured].probabilities, temperature), scores[measured].labels),
        "risk_coverage": risk_coverage(*believed[measured]),
        "thresholds": {f"{wanted:g}": _describe_threshold(believed, wanted) for wanted in PRECISIONS},
    }


def _describe_sets(scores: Mapping[str, Any], fitted: Any) -> dict[str, Any]:
    """The same where an image has any number of labels, each of which is an answer of yes or no."""
    temperature = fit_temperature(*_answers(fitted.logits, fitted.labels))
    measured = "test" if "test" in scores else "validation"
    outcomes = scores[measured].outcomes
    return {
        "temperature": temperature,
        "fitted_on": {
            "split": "validation",
            "images": len(fitted.labels),
            "wrong": int(np.sum(fitted.outcomes.predicted != (fitted.labels > 0))),
        },
        "measured_on": measured,
        "before": quality(outcomes, bins=_BINS),
        "after": quality(SetOutcomes.of_logits(outcomes.logits / temperature, outcomes.labels), bins=_BINS),
        "label_thresholds": dict(zip(fitted.classes, fitted.thresholds.tolist(), strict=True)),
    }


def answers(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of labels (N, K) as those of no and yes, (N * K, 2), and what is right, (N * K,)."""
    return _answers(log_odds(probabilities), labels)


def _answers(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = logits.ravel()
    return np.stack([sigmoid(-flat), sigmoid(flat)], axis=1), (labels.ravel() > 0).astype(np.int64)


def calibrated_labels(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, K) of labels by themselves at a temperature, float64."""
    return sigmoid(log_odds(probabilities) / temperature)


def store_confidence(folder: Path, found: Mapping[str, Any]) -> None:
    """Put temperature and thresholds into the config.json of a model or adapter folder, which transformers keeps."""
    config = read_json(folder / "config.json")
    config[CONFIG_FIELD] = {"temperature": found["temperature"], **_limits(found)}
    write_json(folder / "config.json", config)


def _limits(found: Mapping[str, Any]) -> dict[str, Any]:
    """Thresholds of confidence by precision; or of probability, in the order of the outputs."""
    if "label_thresholds" in found:
        return {FIELD: list(found["label_thresholds"].values())}
    return {
        "thresholds": {
            wanted: None if one is None else one["confidence"] for wanted, one in found["thresholds"].items()
        }
    }


def kept_temperature(config: Any) -> float:
    """The temperature in a model's config.

    Raises:
        ModelError: If there is none.
    """
    return float(_kept(config, "temperature"))


def kept_threshold(config: Any, precision: float) -> float:
    """The least confidence for a precision in a model's config.

    Raises:
        ModelError: If there is none.
    """
    if has_many_labels(config):
        raise ModelError(
            "precision: is for models that give an image one label; this one gives it any number, each from the "
            "threshold that was chosen on validation images; leave precision out"
        )
    thresholds = _kept(config, "thresholds")
    found = thresholds.get(f"{precision:g}")
    if found is None:
        reached = [name for name, value in thresholds.items() if value is not None]
        why = "was not reached on the validation images" if f"{precision:g}" in thresholds else "is not kept"
        raise ModelError(f"precision: {precision:g} {why}; the model has: {', '.join(reached) or 'none'}")
    return float(found)


def _kept(config: Any, name: str) -> Any:
    content = getattr(config, CONFIG_FIELD, None)
    if not isinstance(content, dict) or name not in content:
        raise ModelError(
            f"the model's config.json has no {CONFIG_FIELD}.{name}: it comes from a run with validation images; leave "
            "calibrated and precision out"
        )
    return content[name]


def _describe_threshold(believed: Mapping[str, tuple[np.ndarray, np.ndarray]], wanted: float) -> dict[str, Any] | None:
    found = find_threshold(*believed["validation"], wanted)
    if found is None:
        return None
    splits = {}
    for split, (confidence, right) in believed.items():
        kept = confidence >= found.confidence
        precision = float(right[kept].mean()) if kept.any() else None
        splits[split] = {"precision": precision, "coverage": float(kept.mean())}
    return {"confidence": found.confidence, **splits}


def _quality(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "log_loss": log_loss(probabilities, labels),
        "expected_calibration_error": calibration(probabilities, labels, bins=_BINS)["expected_calibration_error"],
    }


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
