"""How a checkpoint suits some images: a linear probe and nearest neighbours of its features, without training."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.labels import label_array
from hfft.errors import ModelError
from hfft.evaluators.baselines import nearest_neighbours
from hfft.evaluators.linear_probe import probe_logits
from hfft.evaluators.pretrained import Reference
from hfft.evaluators.protocol import ForwardPass, Job
from hfft.metrics.intervals import Interval
from hfft.metrics.multilabel import label_differences
from hfft.metrics.paired_tests import differences
from hfft.metrics.probabilities import log_odds, softmax
from hfft.metrics.scores import LabelScores, Scores, measured
from hfft.replay.replay import TrainingActivations
from hfft.system.distributed import on_main
from hfft.training.settings import training_arguments

_MOST_KNOWN = 20_000  # training images that are learned from; of many classes fewer,
_MOST_WORK, _LEAST = 1e9, 5  # so that images x features x classes take minutes at most, but so many of each class
_TIMED, _TIMES = 8, 5  # images of a forward pass, and how often it is timed


@dataclass(frozen=True)
class Candidate:
    """How a checkpoint does on the validation images.

    Attributes:
        checkpoint: As it was asked for.
        problem: Why it can't be measured; all else is empty then.
        probe: Metric name to value and the ends of its 95 % interval, of a linear probe of its features.
        neighbours: The same of their nearest neighbours.
        difference: The best candidate's headline metric by the linear probe minus this one's, on the same images;
            None of the best.
        images_per_second: Of a forward pass here.
        parameters: Of the encoder.
        image_size: Height and width of its images.
        license: By the checkpoint's card; `unknown` where that says nothing.
    """

    checkpoint: str
    problem: str = ""
    probe: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    neighbours: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    difference: Interval | None = None
    images_per_second: float = 0.0
    parameters: int = 0
    image_size: tuple[int, ...] = ()
    license: str = "unknown"


def measure_candidate(job: Job, network: Any, checkpoint: str) -> tuple[Candidate, Scores]:
    """How the network of a checkpoint, with a new head, does on the validation images; and its linear probe's scores.

    Features come from recordings of the job's first phase, which are made where they aren't there; the job has no run
    folder yet, and gets none.

    Raises:
        ModelError: If it isn't known what enters the network's head.
    """
    images, device = job.images, torch.device(str(PartialState().device))
    forward = ForwardPass.evaluating(evaluation_transform(job.processor), job.phases[0].spec.arguments)
    reference = Reference(network.to(device), forward.first_pixels(images.splits["train"], device))
    if reference.head is None:
        raise ModelError("what enters this network's head is no function of the image alone")
    features = _features(reference, job, forward, checkpoint)

    def answer() -> tuple[Scores, Scores]:
        labels, validation = label_array(images.splits["train"]), images.splits["validation"]
        classes, width = len(images.labels), features["train"].shape[1]
        most = min(_MOST_KNOWN, max(int(_MOST_WORK / (width * classes)), _LEAST * classes), len(labels))
        places = np.linspace(0, len(labels) - 1, most).astype(int)
        known, labels, asked = features["train"][places], labels[places], features["validation"]
        logits = probe_logits(known, labels, asked, classes=classes, seed=job.recipe.seed)
        shares = nearest_neighbours(known.numpy(), labels, asked.numpy(), classes=classes)
        values = (logits, log_odds(shares)) if images.is_multi_label else (softmax(logits), shares)
        probe, neighbours = (measured(value, validation, images.labels) for value in values)
        return probe, neighbours

    probe, neighbours = on_main(answer)
    candidate = Candidate(
        checkpoint,
        probe=probe.metrics,
        neighbours=neighbours.metrics,
        images_per_second=round(_images_per_second(reference), 1),
        parameters=sum(tensor.numel() for tensor in network.parameters() if not tensor.requires_grad),
        image_size=tuple(reference.pixels.shape[2:]),
    )
    return candidate, probe


def difference(scores: Scores, best: Scores) -> dict[str, Interval]:
    """What the best has more than these scores of the same images, of every metric."""
    if isinstance(scores, LabelScores) and isinstance(best, LabelScores):
        return label_differences(scores.outcomes, best.outcomes)
    return differences(scores.probabilities, best.probabilities, scores.labels)


def _features(reference: Reference, job: Job, forward: ForwardPass, title: str) -> dict[str, torch.Tensor]:
    """Features (N, D) of training and validation images; from recordings, unless replay can't or mustn't make them."""
    phase, replayed = job.phases[0], None
    if job.replay is not None:
        with tempfile.TemporaryDirectory(prefix="hfft-choose-") as folder:  # what a phase would note goes there
            arguments = training_arguments(phase.spec, Path(folder), seed=phase.seed, validate=True)
            frozen = job.data.frozen_pass(reference.model, arguments, title)
            replayed = job.replay.open(frozen, 0, Path(folder))
    if replayed is None or replayed.validation is None:
        splits = {split: job.images.splits[split] for split in ("train", "validation")}
        _, found = forward.over(splits, *reference.alone())
        return {split: torch.from_numpy(values) for split, values in found.items()}
    return {
        split: reference.features(
            TrainingActivations(replayed.split_point, part.views[0], is_augmented=False), range(len(part))
        )
        for split, part in (("train", replayed.train), ("validation", replayed.validation))
    }


def _images_per_second(reference: Reference) -> float:
    """Of the fastest of a few forward passes, without reading images."""
    pixels = reference.pixels.expand(_TIMED, -1, -1, -1)
    seconds = []
    with torch.no_grad():
        for _ in range(_TIMES):
            begun = time.perf_counter()
            reference.model(pixel_values=pixels).logits.sum().item()  # waits for an accelerator
            seconds.append(time.perf_counter() - begun)
    return _TIMED / min(seconds)
