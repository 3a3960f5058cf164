"""Which answers to trust: thresholds of probability, and what metrics.json and config.json hold of them.

Confidence is the probability of the answer. All that is fitted, the temperature and the thresholds, comes from the
validation images, and is measured on the test images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfft.errors import ModelError
from hfft.metrics.calibration import calibrated, calibration, fit_temperature, yes_and_no
from hfft.metrics.probabilities import LABEL_THRESHOLD, log_loss, logit_losses, sigmoid
from hfft.model.config import CONFIG_FIELD, has_many_labels
from hfft.system.files import read_json, write_json

if TYPE_CHECKING:
    from hfft.metrics.scores import Scores  # and what reads images with it, which a Classifier doesn't need

PRECISIONS = (0.9, 0.95, 0.99)
"""Precisions that a threshold of confidence is kept for."""

_FIELD = "label_thresholds"  # of the section of hfft in config.json
_LEAST = 1e-38
_BINS = 15
_POINTS = 100


@dataclass(frozen=True)
class Threshold:
    """The least confidence of a trusted answer; share of those that are right, and share of images that get one."""

    confidence: float
    precision: float
    coverage: float


def confidences(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each image's answer, and whether it is right: (N,) float64 and (N,) bool."""
    return probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The share of wrong answers among the most confident ones, as more and more of them are given.

    Answers of equal confidence have no order: each counts as wrong as they are on average.
    Source: https://hf.co/papers/1705.08500.

    Returns:
        `coverage` and `risk` at 100 points at most, and `aurc`, the mean risk over all coverages.
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
    """The least confidence from which the answers are right as often as wanted, a share below 1.

    It lies halfway to the next lower confidence, so that rounding decides nothing. None where there is none with at
    least 1 / (1 - precision) answers, as fewer can't tell.
    """
    levels, level, images = np.unique(-confidence, return_inverse=True, return_counts=True)
    hits = np.cumsum(np.bincount(level, right, minlength=len(levels)))
    answers = np.cumsum(images)
    enough = answers >= round(1 / (1 - precision), 6)
    found = np.flatnonzero((hits / answers >= precision) & enough)
    if not len(found):
        return None
    last = found[-1]
    least = 0.0 if last + 1 == len(levels) else (-levels[last] - levels[last + 1]) / 2
    return Threshold(float(least), float(hits[last] / answers[last]), float(answers[last] / len(right)))


def choose_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each label the threshold with the best F1 on validation images, (K,) float64; both arguments are (N, K).

    It is 0.5 where that is as good as any; else it lies halfway between two neighbouring probabilities, so that
    rounding decides nothing, and of equally good places nearest to 0.5. A label that no image has keeps 0.5. The
    thresholds are those of plain probabilities, as transformers' pipelines give them.
    """
    return np.asarray([_best(probabilities[:, k], labels[:, k] > 0) for k in range(labels.shape[1])])


def _best(scores: np.ndarray, has: np.ndarray) -> float:
    if not has.any():
        return LABEL_THRESHOLD
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of the images with equal probability
    f1 = 2 * np.cumsum(has[order])[last] / (last + 1 + has.sum())  # (T,)
    upper, lower = ranked[last], np.append(ranked[last[1:]], 0.0)
    is_around = (lower < LABEL_THRESHOLD) & (upper >= LABEL_THRESHOLD)
    places = np.where(is_around, LABEL_THRESHOLD, (upper + lower) / 2)
    best = places[f1 == f1.max()]
    return float(max(best[np.argmin(np.abs(best - LABEL_THRESHOLD))], _LEAST))


def at_temperature(thresholds: np.ndarray, temperature: float) -> np.ndarray:
    """Thresholds (K,) of calibrated probabilities that give the same labels."""
    logits = np.log(thresholds) - np.log1p(-thresholds)
    return 1 / (1 + np.exp(-logits / temperature))


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
    after = calibrated(measured.probabilities, temperature)
    more = {
        "before": _quality(measured.probabilities, measured.labels, log_loss(measured.probabilities, measured.labels)),
        "after": _quality(after, measured.labels, log_loss(after, measured.labels)),
        "risk_coverage": risk_coverage(*found[on]),
        "thresholds": {f"{wanted:g}": _describe_threshold(found, wanted) for wanted in PRECISIONS},
    }
    return temperature, int(np.sum(~found["validation"][1])), more


def _quality(probabilities: np.ndarray, labels: np.ndarray, loss: float) -> dict[str, float]:
    error = calibration(probabilities, labels, bins=_BINS)["expected_calibration_error"]
    return {"log_loss": loss, "expected_calibration_error": error}


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
    temperature = fit_temperature(*yes_and_no(fitted.logits, fitted.labels))
    before = measured.logits.astype(np.float64)
    more = {
        name: _quality(sigmoid(logits), measured.labels, float(logit_losses(logits, measured.labels).mean()))
        for name, logits in (("before", before), ("after", before / temperature))
    }
    limits = dict(zip(fitted.classes, fitted.thresholds.tolist(), strict=True))
    return temperature, int(np.sum(fitted.outcomes.wrong)), {**more, "label_thresholds": limits}


def store_confidence(folder: Path, found: Mapping[str, Any]) -> None:
    """Put temperature and thresholds into the config.json of a model or adapter folder, which transformers keeps."""
    if "label_thresholds" in found:
        kept = {_FIELD: list(found["label_thresholds"].values())}  # in the order of the outputs
    else:
        rows = found["thresholds"].items()
        kept = {"thresholds": {wanted: None if row is None else row["confidence"] for wanted, row in rows}}
    config = read_json(folder / "config.json")
    config[CONFIG_FIELD] = {"temperature": found["temperature"], **kept}
    write_json(folder / "config.json", config)


def kept_temperature(config: Any) -> float:
    """The temperature in a model's config; a ModelError if there is none."""
    return float(_kept(config, "temperature"))


def kept_threshold(config: Any, precision: float) -> float:
    """The least confidence for a precision in a model's config; a ModelError if there is none."""
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


def kept_thresholds(config: Any, classes: int) -> np.ndarray:
    """The thresholds of labels in a model's config, (K,); 0.5 for all where it has none.

    Raises:
        ModelError: If they aren't one number between 0 and 1 for each class.
    """
    content = getattr(config, CONFIG_FIELD, None)
    found = content.get(_FIELD) if isinstance(content, dict) else None
    if found is None:
        return np.full(classes, LABEL_THRESHOLD)
    is_fine = isinstance(found, list) and all(isinstance(one, int | float) and 0 < one < 1 for one in found)
    if not is_fine or len(found) != classes:
        raise ModelError(
            f"the model's config.json has {CONFIG_FIELD}.{_FIELD} {found!r}; allowed: {classes} numbers between 0 and "
            "1, in the order of the outputs; remove the key to take 0.5 for all"
        )
    return np.asarray(found, dtype=np.float64)
