"""Label hints of a run: after its head phase, the training images whose label is least believed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.labels import SOFT_LABELS
from hfft.evaluators.confident_learning import FOLDS, MOST_NUMBERS, MOST_WORK, Hint, described, find_hints, out_of_fold
from hfft.evaluators.features import as_before
from hfft.evaluators.pretrained import Reference
from hfft.metrics.scoring import compute
from hfft.replay.replay import Replay
from hfft.runs.record import LABEL_HINTS, PhaseRecord
from hfft.system.distributed import meet
from hfft.system.files import write_json
from hfft.system.machine import cpus_per_process
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.settings import EVAL_BATCH, training_arguments

_WORTH = 0.25  # of the head phase's forward passes: what one more may take
_SHOWN = 3

_LOG = get_logger(__name__)


def hint_labels(
    network: Any, phase: PhaseRun, data: PhaseData, replay: Replay | None, processor: Any, classes: Sequence[str]
) -> None:
    """Write label_hints.json into the run folder after the first phase, unless it is there, and tell of it in a line.

    Only training images are looked at. Where the phase was replayed, their features are recorded already.

    Args:
        network: After the phase, without adapter; is left as it was, but for which parameters are trainable.
        phase: The first phase.
        data: What it trained on.
        replay: What it was fed from.
        processor: The network's.
        classes: Names.
    """
    path = phase.folder.parent / LABEL_HINTS
    is_there = path.is_file()
    meet()  # all have looked
    if not is_there:
        _write_hints(path, network, phase, data, replay, processor, classes)
    meet()


def _write_hints(
    path: Path,
    network: Any,
    phase: PhaseRun,
    data: PhaseData,
    replay: Replay | None,
    processor: Any,
    classes: Sequence[str],
) -> None:
    begun = time.monotonic()
    obstacle = _obstacle(phase, data, len(classes))
    features = None
    if obstacle is None:
        with as_before(network):
            features = _features(network, phase, data, replay, processor, len(classes))
    if not PartialState().is_main_process:
        return
    if not isinstance(features, torch.Tensor):
        _leave_out(path, obstacle or str(features))
        return
    labels = np.asarray(data.train.rows["label"][:], dtype=np.int64)
    probabilities = out_of_fold(features, labels, classes=len(classes), seed=phase.seed)
    hints = find_hints(probabilities, labels)
    content = {
        "left_out": None,
        "images": len(labels),
        "folds": FOLDS,
        "accuracy": round(float((probabilities.argmax(axis=1) == labels).mean()), 6),
        "seconds": round(time.monotonic() - begun, 3),
        "hints": described(hints, data.train.rows["file"][:], classes),
    }
    write_json(path, content)
    _tell(hints, content, path)


def _obstacle(phase: PhaseRun, data: PhaseData, classes: int) -> str | None:
    rows = data.train.rows
    if not phase.spec.trains_head_alone:
        return f"{phase.spec.name}, the first phase, trains more than the head"
    if SOFT_LABELS in rows.column_names or np.asarray(rows[:1]["label"]).shape != (1,):
        return "an image has more than one label"
    least = np.bincount(np.asarray(rows["label"][:]), minlength=classes)
    if np.sort(least)[-2:].min() < FOLDS:
        return f"fewer than two classes have {FOLDS} training images"
    return None


def _features(
    network: Any, phase: PhaseRun, data: PhaseData, replay: Replay | None, processor: Any, classes: int
) -> torch.Tensor | str:
    """What enters the head, (N, D), the same in every process; or why that is not known."""
    network.to(PartialState().device)
    transform = evaluation_transform(processor)
    examples = Examples(data.train.rows, transform.pixels)
    pixels = transform.floats(examples[0]["pixel_values"][None].to(network.device))
    reference = Reference(network, pixels)
    if reference.head is None:
        return "what enters this network's head is no function of the image alone"
    arguments = training_arguments(phase.spec, phase.folder, seed=phase.seed, validate=data.validation is not None)
    recorded = None
    if replay is not None:
        frozen = data.frozen_pass(network, arguments, "label hints")
        recorded = replay.recorded(frozen, reference.head, phase.folder)
    if recorded is not None:
        width = reference.features(recorded, [0]).shape[1]
        return _too_many(len(examples), width, classes) or reference.features(recorded, range(len(examples)))
    record = PhaseRecord(phase.folder)
    steps = 0 if record.result is None else record.result.steps
    if len(examples) > _WORTH * record.plan.batch * steps:
        return (
            "nothing was recorded (replay), and another pass over the training images would take more than a quarter "
            f"of {phase.spec.name}"
        )
    device_batch = phase.spec.arguments.get("per_device_eval_batch_size", EVAL_BATCH)
    network_of_both, then = reference.alone()
    workers = phase.spec.arguments.get("dataloader_num_workers", min(cpus_per_process(), 8))
    found = compute(network_of_both, examples, transform.floats, batch_size=device_batch, workers=workers, then=then)
    return _too_many(len(examples), found[1].shape[1], classes) or torch.from_numpy(found[1])


def _too_many(images: int, width: int, classes: int) -> str | None:
    if images * width * classes > MOST_WORK or images * width > MOST_NUMBERS:
        return f"{images:,} images with {width:,} features and {classes:,} classes would take minutes, or gigabytes"
    return None


def _leave_out(path: Path, why: str) -> None:
    write_json(path, {"left_out": why, "hints": []})
    _LOG.info(f"label hints: left out: {why}")


def _tell(hints: Sequence[Hint], content: dict[str, Any], path: Path) -> None:
    images, listed = content["images"], content["hints"]
    if not hints:
        _LOG.info(f"label hints: none among {images:,} training images")
        return
    first = ", ".join(f"{row['file']} ({row['label']}, or {row['believed']}?)" for row in listed[:_SHOWN])
    _LOG.info(
        f"label hints: {len(hints):,} of {images:,} training images may belong to another class, to be looked at: "
        f"{first}{', ...' if len(hints) > _SHOWN else ''}; {path} lists them"
    )
