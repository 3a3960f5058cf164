"""Predictions of a model on a split, and what they are worth: for one label per image, and for any number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from hfft.data.sources.labels import is_multi_label, label_array
from hfft.metrics.bootstrap import Interval, with_intervals
from hfft.metrics.calibration import calibration
from hfft.metrics.multilabel import SetOutcomes, log_odds, set_intervals, sigmoid
from hfft.metrics.multilabel_secondary import set_calibration, set_details, set_scores
from hfft.metrics.per_class import class_scores, confusion
from hfft.metrics.secondary import details
from hfft.metrics.thresholds import DEFAULT


@dataclass(frozen=True)
class Scores:
    """Predictions of a model on a split, and what they are worth.

    Attributes:
        classes: Class names.
        files: Name of each image, (N,).
        labels: Class index of each image, (N,).
        probabilities: (N, K) float32.
        metrics: Metric name to value and the ends of its 95 % interval; None where there are too few images to say.
        by_class: Class name to precision, recall and F1 with intervals, and images; see `class_scores`.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    metrics: dict[str, Interval]
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
        probabilities: Of each label by itself, (N, K) float64.
        thresholds: The probability from which a label is given, (K,).
        logits: What the probabilities come from, (N, K).
    """

    thresholds: np.ndarray
    logits: np.ndarray

    @property
    def outcomes(self) -> SetOutcomes:
        """What was predicted and what is true."""
        return SetOutcomes.of_logits(self.logits, self.labels, self.probabilities >= self.thresholds)

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
        """One row per image, as in predictions.parquet: `label` and `prediction` are lists of class names.

        A probability near 1 doesn't tell how sure a model is, so the logits are beside them.
        """
        names = np.asarray(self.classes, dtype=object)
        table = pd.DataFrame({"split": split, "file": self.files})
        for column, sets in (("label", self.labels > 0), ("prediction", self.outcomes.predicted)):
            table[column] = [names[row].tolist() for row in sets]
        numbers = (("probability", self.probabilities), ("logit", self.logits))
        columns = {
            f"{kind} {name}": values[:, k].astype(np.float32)
            for kind, values in numbers
            for k, name in enumerate(self.classes)
        }
        return pd.concat([table, pd.DataFrame(columns)], axis=1)


def measured(
    values: np.ndarray, rows: Dataset, classes: Sequence[str], thresholds: np.ndarray | None = None
) -> Scores:
    """What predictions for the images of a split are worth.

    Args:
        values: Probabilities of the classes, or of multi-label rows logits, (N, K).
        rows: The images.
        classes: Class names.
        thresholds: Of multi-label rows, the probability from which a label is given, (K,); 0.5 for all when None.
    """
    labels, classes = label_array(rows), tuple(classes)
    if not is_multi_label(rows):
        return Scores(
            classes=classes,
            files=tuple(rows["file"][:]),
            labels=labels,
            probabilities=values,
            metrics=with_intervals(values, labels),
            by_class=class_scores(values.argmax(axis=1), labels, classes),
        )
    limits = np.full(len(classes), DEFAULT) if thresholds is None else thresholds
    probabilities = sigmoid(values)
    outcomes = SetOutcomes.of_logits(values, labels, probabilities >= limits)
    return SetScores(
        classes=classes,
        files=tuple(rows["file"][:]),
        labels=labels,
        probabilities=probabilities,
        metrics=set_intervals(outcomes),
        by_class=set_scores(outcomes, limits, classes),
        thresholds=limits,
        logits=values,
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


def logits_of(table: pd.DataFrame, classes: Sequence[str], ending: str = "") -> np.ndarray:
    """Logits (N, K) in a table of predictions of sets; earlier versions kept probabilities alone.

    Args:
        table: Of predictions.
        classes: Class names.
        ending: Of the columns' names, after the class.
    """
    names = [f"logit {name}{ending}" for name in classes]
    if set(names) <= set(table.columns):
        return table[names].to_numpy(np.float64)
    return log_odds(table[[f"probability {name}{ending}" for name in classes]].to_numpy(np.float32))
