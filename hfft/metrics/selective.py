"""Which answers to trust: thresholds of confidence, and what metrics.json and config.json hold of them.

Confidence is the probability of the answer. All that is fitted, the temperature and the thresholds, comes from the
validation images, and is measured on the test images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfft.errors import ModelError
from hfft.metrics.calibration import answers_of_logits, calibrated, calibration, fit_temperature
from hfft.metrics.probabilities import log_loss, logit_losses, sigmoid
from hfft.metrics.thresholds import FIELD
from hfft.model.config import CONFIG_FIELD, has_many_labels
from hfft.system.files import read_json, write_json

if TYPE_CHECKING:
    from hfft.metrics.scores import Scores  # and what reads images with it, which a Classifier doesn't need

PRECISIONS = (0.9, 0.95, 0.99)
"""Precisions that a threshold of confidence is kept for."""

_BINS = 15
_POINTS = 100


@dataclass(frozen=True)
class Threshold:
    """The confidence from which answers are trusted, and what that gave on the images that it was chosen on.

    Attributes:
        confidence: Least confidence.
        precision: Share of right answers among those with at least that.
        coverage: Share of images that get such an answer.
    """

    confidence: float
    precision: float
    coverage: float


def confidences(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each image's answer, and whether it is right: (N,) float64 and (N,) bool."""
    return probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The share of wrong answers among the most confident ones, as more and more of them are given.

    Source: https://hf.co/papers/1705.08500.

    Args:
        confidence: (N,).
        right: (N,) bool.

    Returns:
        `coverage` and `risk` at 100 points at most, and `aurc`, the mean risk over all coverages. Answers of equal
        confidence have no order: each counts as wrong as they are on average.
    """
    levels, level, images = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(level, ~right, minlength=len(levels)) / images
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
        right: (N,) bool.
        precision: Wanted share of right answers, below 1.

    Returns:
        None where there is none with at least 1 / (1 - precision) answers, as fewer can't tell.
    """
    levels, level, images = np.unique(-confidence, return_inverse=True, return_counts=True)
    hits = np.cumsum(np.bincount(level, right, minlength=len(levels)))
    answers = np.cumsum(images)
    enough = answers >= round(1 / (1 - precision), 6)
    found = np.flatnonzero((hits / answers >= precision) & enough)
    if not len(found):
        return None
    last = found[-1]
    is_all = last + 1 == len(levels)
    least = 0.0 if is_all else (-levels[last] - levels[last + 1]) / 2
    return Threshold(float(least), float(hits[last] / answers[last]), float(answers[last] / len(right)))


def describe_confidence(scores: Mapping[str, "Scores"]) -> dict[str, Any] | None:
    """What metrics.json holds under `confidence`, of scores by split; None without validation images."""
    if "validation" not in scores:
        return None
    fitted, on = scores["validation"], "test" if "test" in scores else "validation"
    temperature, wrong, more = _of_classes(scores, on) if fitted.labels.ndim == 1 else _of_labels(fitted, scores[on])
    return {
        "temperature": temperature,
        "fitted_on": {"split": "validation", "images": len(fitted.labels), "wrong": wrong},
        "measured_on": on,
        **more,
    }


def _of_classes(scores: Mapping[str, "Scores"], on: str) -> tuple[float, int, dict[str, Any]]:
    """Temperature, wrong answers among the images that it was fitted on, and what was measured."""
    fitted, measured = scores["validation"], scores[on]
    temperature = fit_temperature(fitted.probabilities, fitted.labels)
    found = {name: confidences(calibrated(one.probabilities, temperature), one.labels) for name, one in scores.items()}

    def quality(probabilities: np.ndarray) -> dict[str, float]:
        error = calibration(probabilities, measured.labels, bins=_BINS)["expected_calibration_error"]
        return {"log_loss": log_loss(probabilities, measured.labels), "expected_calibration_error": error}

    more = {
        "before": quality(measured.probabilities),
        "after": quality(calibrated(measured.probabilities, temperature)),
        "risk_coverage": risk_coverage(*found[on]),
        "thresholds": {f"{wanted:g}": _describe_threshold(found, wanted) for wanted in PRECISIONS},
    }
    return temperature, int(np.sum(~found["validation"][1])), more


def _describe_threshold(found: Mapping[str, tuple[np.ndarray, np.ndarray]], wanted: float) -> dict[str, Any] | None:
    threshold = find_threshold(*found["validation"], wanted)
    if threshold is None:
        return None
    splits = {}
    for split, (confidence, right) in found.items():
        kept = confidence >= threshold.confidence
        precision = float(right[kept].mean()) if kept.any() else None
        splits[split] = {"precision": precision, "coverage": float(kept.mean())}
    return {"confidence": threshold.confidence, **splits}


def _of_labels(fitted: Any, measured: Any) -> tuple[float, int, dict[str, Any]]:
    """The same where an image has any number of labels, each of which is an answer of yes or no."""
    temperature = fit_temperature(*answers_of_logits(fitted.logits, fitted.labels))

    def quality(logits: np.ndarray) -> dict[str, float]:
        error = calibration(sigmoid(logits), measured.labels, bins=_BINS)["expected_calibration_error"]
        return {
            "log_loss": float(logit_losses(logits, measured.labels).mean()),
            "expected_calibration_error": error,
        }

    logits = measured.logits.astype(np.float64)
    more = {
        "before": quality(logits),
        "after": quality(logits / temperature),
        "label_thresholds": dict(zip(fitted.classes, fitted.thresholds.tolist(), strict=True)),
    }
    return temperature, int(np.sum(fitted.outcomes.wrong)), more


def store_confidence(folder: Path, found: Mapping[str, Any]) -> None:
    """Put temperature and thresholds into the config.json of a model or adapter folder, which transformers keeps."""
    if "label_thresholds" in found:
        kept = {FIELD: list(found["label_thresholds"].values())}  # in the order of the outputs
    else:
        rows = found["thresholds"].items()
        kept = {"thresholds": {wanted: None if row is None else row["confidence"] for wanted, row in rows}}
    config = read_json(folder / "config.json")
    config[CONFIG_FIELD] = {"temperature": found["temperature"], **kept}
    write_json(folder / "config.json", config)


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
