"""Training labels that look wrong: confident learning, https://hf.co/papers/1911.00068, after the head phase.

What is compared with an image's label was never trained on that label: features come from the pretrained network,
probabilities from a linear probe of other folds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.labels import SOFT_LABELS
from hfft.evaluators.features import as_before
from hfft.evaluators.pretrained import Reference
from hfft.evaluators.protocol import Evaluator, ForwardPass, Job
from hfft.metrics.probabilities import log_loss
from hfft.runs.record import LABEL_ISSUES, PhaseRecord
from hfft.system.distributed import meet
from hfft.system.files import write_json
from hfft.training.logistic import ROUGH_STEPS, head_path, held_out_logits
from hfft.training.phase_data import PhaseRun

FOLDS = 5
MOST_WORK = 3e10  # images x features x classes; more would take minutes on a CPU
MOST_NUMBERS = 2e8  # images x features; a GiB
_WORTH = 0.25  # of the head phase's forward passes: what one more may take
_SHOWN = 3
_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the weight penalty, relative to a mean of losses
_SAMPLE = 5000  # images that the strength is chosen on

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class LabelIssue:
    """A training image that may belong to another class."""

    row: int  # its place among the training images
    label: int  # its class as given
    believed: int  # the class that the probe finds more probable
    label_probability: float
    believed_probability: float


class LabelIssues(Evaluator):
    """Writes label_issues.json after a first phase that trains the head alone, unless it is there."""

    name = "label issues"

    def after_phase(self, job: Job, phase: PhaseRun, network: Any) -> None:
        """Only training images are looked at; where the phase was replayed, their features are recorded already."""
        if phase.number > 0:
            return
        is_there = (job.folder / LABEL_ISSUES).is_file()
        meet()  # all have looked
        if not is_there:
            _write_issues(job.folder / LABEL_ISSUES, job, phase, network)
        meet()


def _write_issues(path: Path, job: Job, phase: PhaseRun, network: Any) -> None:
    begun = time.monotonic()
    found = _obstacle(phase, job)
    if found is None:
        with as_before(network):
            found = _features(network, phase, job)
    if not PartialState().is_main_process:
        return
    if isinstance(found, str):
        write_json(path, {"left_out": found, "hints": []})
        _LOG.info(f"label issues: left out: {found}")
        return
    rows, classes = job.data.train.rows, job.images.labels
    labels = np.asarray(rows["label"][:], dtype=np.int64)
    probabilities = out_of_fold(found, labels, classes=len(classes), seed=phase.seed)
    issues = described(find_label_issues(probabilities, labels), rows["file"][:], classes)
    content = {
        "left_out": None,
        "images": len(labels),
        "folds": FOLDS,
        "accuracy": round(float((probabilities.argmax(axis=1) == labels).mean()), 6),
        "seconds": round(time.monotonic() - begun, 3),
        "hints": issues,
    }
    write_json(path, content)
    _log(issues, len(labels), path)


def _obstacle(phase: PhaseRun, job: Job) -> str | None:
    rows = job.data.train.rows
    if not phase.spec.trains_head_alone:
        return f"{phase.spec.name}, the first phase, trains more than the head"
    if SOFT_LABELS in rows.column_names or np.asarray(rows[:1]["label"]).shape != (1,):
        return "an image has more than one label"
    counts = np.bincount(np.asarray(rows["label"][:]), minlength=len(job.images.labels))
    if np.sort(counts)[-2:].min() < FOLDS:
        return f"fewer than two classes have {FOLDS} training images"
    return None


def _features(network: Any, phase: PhaseRun, job: Job) -> torch.Tensor | str:
    """What enters the head, (N, D), the same in every process; or why that is not known."""
    rows, classes = job.data.train.rows, len(job.images.labels)
    forward = ForwardPass.evaluating(evaluation_transform(job.processor), phase.spec.arguments)
    network.to(PartialState().device)
    reference = Reference(network, forward.first_pixels(rows, network.device))
    if reference.head is None:
        return "what enters this network's head is no function of the image alone"
    recorded = reference.training_activations(job)
    if recorded is not None:
        width = reference.features(recorded, [0]).shape[1]
        return _too_many(len(rows), width, classes) or reference.features(recorded, range(len(rows)))
    record = PhaseRecord(phase.folder)
    steps = 0 if record.result is None else record.result.steps
    if len(rows) > _WORTH * record.plan.batch * steps:
        return (
            "nothing was recorded (replay), and another pass over the training images would take more than a quarter "
            f"of {phase.spec.name}"
        )
    _, features = forward.over({"train": rows}, *reference.alone())
    return _too_many(len(rows), features["train"].shape[1], classes) or torch.from_numpy(features["train"])


def _too_many(images: int, width: int, classes: int) -> str | None:
    if images * width * classes > MOST_WORK or images * width > MOST_NUMBERS:
        return f"{images:,} images with {width:,} features and {classes:,} classes would take minutes, or gigabytes"
    return None


def _log(issues: Sequence[Mapping[str, Any]], images: int, path: Path) -> None:
    if not issues:
        _LOG.info(f"label issues: none among {images:,} training images")
        return
    shown = [f"{row['file']} ({row['label']}, or {row['believed']}?)" for row in issues[:_SHOWN]]
    first = ", ".join([*shown, *(["..."] if len(issues) > _SHOWN else [])])
    _LOG.info(
        f"label issues: {len(issues):,} of {images:,} training labels look wrong: {first}; review them in {path}"
    )


def out_of_fold(features: torch.Tensor, labels: np.ndarray, *, classes: int, seed: int) -> np.ndarray:
    """Probabilities of each image by a linear probe of those in other folds, (N, K) float32.

    The probe is logistic regression on standardised features (N, D) of class indices (N,); the strength of its penalty
    is the one of a few with the smallest out-of-fold log loss. The seed divides the images into folds, each class
    evenly.
    """
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.permutation(len(labels))[:_SAMPLE])
    some, targets = features[sample], labels[sample]
    tried = _probe(some, targets, _folds(targets, rng), classes, _STRENGTHS)
    best = int(np.argmin([log_loss(found, targets) for found in tried]))
    if len(sample) == len(labels):
        return tried[best]
    return _probe(features, labels, _folds(labels, rng), classes, _STRENGTHS[best : best + 1])[0]


def find_label_issues(probabilities: np.ndarray, labels: np.ndarray) -> list[LabelIssue]:
    """Images that confidently belong to another class than their own, the least probable label first.

    A class is confident of an image if its out-of-fold probability, of (N, K), reaches the mean that the class has
    among its own images. Label issues are the images off the diagonal of the confident joint: of the classes that are
    confident of them, the most probable one is another than theirs, and more probable. They are ordered by the margin
    between the two. Images of classes with fewer than FOLDS of them are not judged.
    """
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    own = probabilities[np.arange(len(labels)), labels]  # (N,)
    sums = np.bincount(labels, weights=own, minlength=len(counts))
    thresholds = np.where(counts >= FOLDS, sums / np.maximum(counts, 1), np.inf)  # (K,)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)  # (N, K)
    believed = confident.argmax(axis=1)
    margins = own - confident.max(axis=1)
    is_issue = (believed != labels) & (confident.max(axis=1) > own) & (counts[labels] >= FOLDS)
    rows = np.flatnonzero(is_issue)
    rows = rows[np.argsort(margins[rows], kind="stable")]
    return [
        LabelIssue(row, int(labels[row]), int(believed[row]), float(own[row]), float(confident[row, believed[row]]))
        for row in rows.tolist()
    ]


def _folds(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The fold of each image, (N,); each class is spread evenly."""
    folds = np.empty(len(labels), np.int64)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def _probe(
    features: torch.Tensor, labels: np.ndarray, folds: np.ndarray, classes: int, strengths: Sequence[float]
) -> np.ndarray:
    """Probabilities by the heads of other folds, for each strength, (S, N, K) float32."""
    targets = torch.from_numpy(labels).to(features.device)
    solve = partial(head_path, classes=classes, weight_decays=strengths, most_steps=ROUGH_STEPS)
    return held_out_logits([features], targets, torch.from_numpy(folds), solve).softmax(dim=2).float().numpy()


def described(issues: Sequence[LabelIssue], files: Sequence[str], classes: Sequence[str]) -> list[dict[str, object]]:
    """Label issues as label_issues.json has them, with names in the place of numbers."""
    return [
        {
            "rank": rank,
            "row": issue.row,
            "file": files[issue.row],
            "label": classes[issue.label],
            "label_probability": round(issue.label_probability, 6),
            "believed": classes[issue.believed],
            "believed_probability": round(issue.believed_probability, 6),
        }
        for rank, issue in enumerate(issues, start=1)
    ]
