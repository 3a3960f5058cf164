"""Predictions of a model on a split, and what they are worth: for one label per image, and for any number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from hfft.data.labels import is_multi_label, labels_of
from hfft.evaluation.calibration import calibration
from hfft.evaluation.classes import class_scores, confusion
from hfft.evaluation.details import details
from hfft.evaluation.intervals import with_intervals
from hfft.evaluation.multilabel import SetOutcomes, sets_with_intervals
from hfft.evaluation.set_details import set_calibration, set_details, set_scores
from hfft.evaluation.thresholds import DEFAULT


@dataclass(frozen=True)
class Scores:
    """Predictions of a model on a split, and what they are worth.

    Attributes:
        classes: Class names.
        files: Name of each image, (N,).
        labels: Class index of each image, (N,).
        probabilities: (N, K) float32.
        metrics: Metric name to value and the ends of its 95 % bootstrap interval.
        by_class: Class name to precision, recall and F1 with intervals, and images; see `class_scores`.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    metrics: dict[str, dict[str, float]]
    by_class: dict[str, dict[str, float]]

    @property
    def details(self) -> dict[str, float]:
        """More metrics, without intervals."""
        return details(self.probabilities, self.labels)

    def table(self, split: str) -> pd.DataFrame:
        """One row per image, as in predictions.parquet."""
        best = self.probabilities.argmax(axis=1)
        names = np.asarray(self.classes, dtype=object)
        table = pd.DataFrame(
            {
                "split": split,
                "file": self.files,
                "label": names[self.labels],
                "prediction": names[best],
                "probability": self.probabilities.max(axis=1),
            }
        )
        columns = {f"probability {name}": self.probabilities[:, k] for k, name in enumerate(self.classes)}
        return pd.concat([table, pd.DataFrame(columns)], axis=1)

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Class to predicted class to images."""
        return confusion(self.probabilities.argmax(axis=1), self.labels, self.classes)

    @property
    def calibration(self) -> dict[str, Any]:
        """Accuracy beside confidence."""
        return calibration(self.probabilities, self.labels)

    @property
    def headline(self) -> str:
        """Name of the metric that comes first."""
        return next(iter(self.metrics))


@dataclass(frozen=True)
class SetScores(Scores):
    """The same where an image has any number of labels.

    Attributes:
        labels: Which labels each image has, (N, K) uint8 of 0 and 1.
        probabilities: Of each label by itself, (N, K) float32.
        thresholds: The probability from which a label is given, (K,).
    """

    thresholds: np.ndarray

    @property
    def outcomes(self) -> SetOutcomes:
        """What was predicted and what is true."""
        return SetOutcomes.of(self.probabilities, self.labels, self.probabilities >= self.thresholds)

    @property
    def details(self) -> dict[str, float]:
        """More metrics, without intervals."""
        return set_details(self.outcomes)

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Empty: no label is taken for another where each is predicted by itself."""
        return {}

    @property
    def calibration(self) -> dict[str, Any]:
        """Share of images that have a label beside its probability."""
        return set_calibration(self.probabilities, self.labels)

    def table(self, split: str) -> pd.DataFrame:
        """One row per image, as in predictions.parquet: `label` and `prediction` are lists of class names."""
        names = np.asarray(self.classes, dtype=object)
        table = pd.DataFrame({"split": split, "file": self.files})
        for column, sets in (("label", self.labels > 0), ("prediction", self.outcomes.predicted)):
            table[column] = [names[row].tolist() for row in sets]
        columns = {f"probability {name}": self.probabilities[:, k] for k, name in enumerate(self.classes)}
        return pd.concat([table, pd.DataFrame(columns)], axis=1)


def measured(
    probabilities: np.ndarray, rows: Dataset, classes: Sequence[str], thresholds: np.ndarray | None = None
) -> Scores:
    """What probabilities for the images of a split are worth.

    Args:
        probabilities: (N, K).
        rows: The images.
        classes: Class names.
        thresholds: Of multi-label rows, the probability from which a label is given, (K,); 0.5 for all when None.
    """
    labels, classes = labels_of(rows), tuple(classes)
    if not is_multi_label(rows):
        return Scores(
            classes=classes,
            files=tuple(rows["file"][:]),
            labels=labels,
            probabilities=probabilities,
            metrics=with_intervals(probabilities, labels),
            by_class=class_scores(probabilities.argmax(axis=1), labels, classes),
        )
    limits = np.full(len(classes), DEFAULT) if thresholds is None else thresholds
    outcomes = SetOutcomes.of(probabilities, labels, probabilities >= limits)
    return SetScores(
        classes=classes,
        files=tuple(rows["file"][:]),
        labels=labels,
        probabilities=probabilities,
        metrics=sets_with_intervals(probabilities, labels, outcomes.predicted),
        by_class=set_scores(outcomes, limits, classes),
        thresholds=limits,
    )


def holds_sets(table: pd.DataFrame) -> bool:
    """Whether a table of predictions is of images with any number of labels."""
    return len(table) > 0 and not isinstance(table["label"].iloc[0], str)


def flags_of(column: pd.Series, classes: Sequence[str]) -> np.ndarray:
    """Lists of class names, as a table of predictions has them, to (N, K) uint8 of 0 and 1."""
    places = {name: place for place, name in enumerate(classes)}
    found = np.zeros((len(column), len(classes)), dtype=np.uint8)
    for row, names in enumerate(column):
        found[row, [places[name] for name in names]] = 1
    return found
