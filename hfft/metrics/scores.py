"""Predictions of a model on a split and their metrics: for one label per image, and for any number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from hfft.data.sources.labels import is_multi_label, label_array
from hfft.metrics.calibration import calibration
from hfft.metrics.evaluate_modules import headline_metrics, label_headline_metrics
from hfft.metrics.intervals import Interval, wilson, with_intervals
from hfft.metrics.metrics import details
from hfft.metrics.multilabel import LabelOutcomes, label_details, label_intervals
from hfft.metrics.probabilities import LABEL_THRESHOLD, log_odds, sigmoid


@dataclass(frozen=True)
class Scores:
    """Predictions of a model on a split, and their metrics.

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
    by_class: dict[str, dict[str, Any]]

    @property
    def details(self) -> dict[str, float]:
        """More metrics, without intervals."""
        return details(self.probabilities, self.labels)

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Class to predicted class to images; zeros are left out."""
        pairs = np.stack([self.labels, self.probabilities.argmax(axis=1)])
        (labels, given), counts = np.unique(pairs, axis=1, return_counts=True)  # each (P,)
        found: dict[str, dict[str, int]] = {name: {} for name in self.classes}
        for label, answer, count in zip(labels.tolist(), given.tolist(), counts.tolist(), strict=True):
            found[self.classes[label]][self.classes[answer]] = count
        return found

    @property
    def calibration(self) -> dict[str, Any]:
        """Accuracy by confidence."""
        return calibration(self.probabilities, self.labels)

    @property
    def headline(self) -> str:
        """Name of the metric that comes first."""
        return next(iter(self.metrics))

    def table(self, split: str) -> pd.DataFrame:
        """One row per image, as in predictions.parquet."""
        names = np.asarray(self.classes, dtype=object)
        columns: dict[str, Any] = {
            "split": split,
            "file": self.files,
            "label": names[self.labels],
            "prediction": names[self.probabilities.argmax(axis=1)],
            "probability": self.probabilities.max(axis=1),
        }
        return pd.DataFrame(
            columns | {f"probability {name}": self.probabilities[:, k] for k, name in enumerate(names)}
        )


@dataclass(frozen=True)
class LabelScores(Scores):
    """The same where an image has any number of labels: `labels` are (N, K) uint8 of 0 and 1.

    Attributes:
        thresholds: The probability from which a label is given, (K,).
        logits: Of the probabilities, (N, K).
    """

    thresholds: np.ndarray
    logits: np.ndarray

    @property
    def outcomes(self) -> LabelOutcomes:
        """What was predicted and what is true."""
        return LabelOutcomes.of_logits(self.logits, self.labels, self.probabilities >= self.thresholds)

    @property
    def details(self) -> dict[str, float]:
        """More metrics, without intervals."""
        return label_details(self.outcomes)

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Empty: no label is taken for another where each is predicted by itself."""
        return {}

    def table(self, split: str) -> pd.DataFrame:
        """One row per image, as in predictions.parquet: `label` and `prediction` are lists of class names.

        A probability near 1 doesn't tell how sure a model is, so there are columns of logits, too.
        """
        names = np.asarray(self.classes, dtype=object)
        columns: dict[str, Any] = {"split": split, "file": self.files}
        for column, flags in (("label", self.labels > 0), ("prediction", self.outcomes.predicted)):
            columns[column] = [names[row].tolist() for row in flags]
        for kind, values in (("probability", self.probabilities), ("logit", self.logits)):
            columns |= {f"{kind} {name}": values[:, k].astype(np.float32) for k, name in enumerate(names)}
        return pd.DataFrame(columns)


def measured(
    values: np.ndarray, rows: Dataset, classes: Sequence[str], thresholds: np.ndarray | None = None
) -> Scores:
    """Scores of the images of a split, from probabilities of the classes, or of multi-label rows logits, (N, K).

    `thresholds` are the probabilities from which labels are given, (K,); 0.5 for all when None.
    """
    labels, classes, files = label_array(rows), tuple(classes), tuple(rows["file"][:])
    if not is_multi_label(rows):
        metrics = with_intervals(values, labels, values=headline_metrics(values, labels))
        return Scores(classes, files, labels, values, metrics, class_scores(values.argmax(axis=1), labels, classes))
    limits = np.full(len(classes), LABEL_THRESHOLD) if thresholds is None else thresholds
    probabilities = sigmoid(values)
    outcomes = LabelOutcomes.of_logits(values, labels, probabilities >= limits)
    metrics = label_intervals(outcomes, label_headline_metrics(values, labels, limits))
    by_class = label_scores(outcomes, limits, classes)
    return LabelScores(classes, files, labels, probabilities, metrics, by_class, limits, values)


def class_scores(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of each class, with the ends of their 95 % intervals, of class indices (N,).

    The intervals are Wilson's for shares of images: of those of the class (recall), of those that were taken for it
    (precision). F1 is 2 J / (1 + J), where J is the share of right ones among the images that are of the class or were
    taken for it, and its interval is that of J.
    Source: Hand et al., F*: an interpretable transformation of the F-measure, https://arxiv.org/abs/2008.00103.

    Returns:
        Class name to `precision`, `recall` and `f1`, each with `_low` and `_high`, and `images` of the class and
        `predicted` images. Without images, or predictions, a share is 0 and its interval reaches from 0 to 1.
    """
    counts = (np.bincount(part, minlength=len(classes)) for part in (labels[predicted == labels], labels, predicted))
    return _by_class(classes, _shares(*counts))


def label_scores(outcomes: LabelOutcomes, thresholds: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scores of each label as in `class_scores`, with its average precision (None without images) and threshold."""
    counts = outcomes.tally()
    shares = _shares(*(part.astype(int) for part in (counts.hits, counts.images, counts.predicted)))
    shares |= {"average_precision": counts.average_precision, "threshold": thresholds}
    table = _by_class(classes, shares)
    for row in table.values():
        if np.isnan(row["average_precision"]):
            row["average_precision"] = None
    return table


def _shares(hits: np.ndarray, images: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `class_scores`, (K,) each."""
    jaccard = wilson(hits, images + predicted - hits)
    columns: dict[str, np.ndarray] = {}
    for name, value, (low, high) in (
        ("precision", hits / np.maximum(predicted, 1), wilson(hits, predicted)),
        ("recall", hits / np.maximum(images, 1), wilson(hits, images)),
        ("f1", 2 * hits / np.maximum(images + predicted, 1), [2 * end / (1 + end) for end in jaccard]),
    ):
        columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return columns | {"images": images, "predicted": predicted}


def _by_class(classes: Sequence[str], columns: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {name: dict(zip(columns, row, strict=True)) for name, row in zip(classes, rows, strict=True)}


def is_multi_label_table(table: pd.DataFrame) -> bool:
    """Whether a table of predictions is of images with any number of labels."""
    return len(table) > 0 and not isinstance(table["label"].iloc[0], str)


def indicators_of(column: pd.Series, classes: Sequence[str]) -> np.ndarray:
    """Lists of class names, as a table of predictions has them, to (N, K) uint8 of 0 and 1."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = np.zeros((len(column), len(classes)), dtype=np.uint8)
    for row, names in enumerate(column):
        found[row, [numbers[name] for name in names]] = 1
    return found


def logits_of(table: pd.DataFrame, classes: Sequence[str], ending: str = "") -> np.ndarray:
    """Logits (N, K) in a multi-label table of predictions; earlier versions kept probabilities alone.

    `ending` is that of the columns' names, after the class.
    """
    names = [f"logit {name}{ending}" for name in classes]
    if set(names) <= set(table.columns):
        return table[names].to_numpy(np.float64)
    return log_odds(table[[f"probability {name}{ending}" for name in classes]].to_numpy(np.float32))
