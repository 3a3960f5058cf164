"""The protocol of all that measures a run and does not train it, and the values that evaluators get."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import Transform
from hfft.data.sources.labels import label_array
from hfft.data.sources.reading import ImageData
from hfft.metrics.probabilities import sigmoid, softmax
from hfft.metrics.scores import Scores, measured
from hfft.metrics.scoring import Logits, Run, compute, divided
from hfft.metrics.thresholds import choose_thresholds
from hfft.recipe.spec import Recipe
from hfft.replay.replay import Replay
from hfft.runs.record import PhaseResult
from hfft.system.machine import cpus_per_process
from hfft.training.model_selection import Selection
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.settings import EVAL_BATCH

Then = Callable[..., Sequence[torch.Tensor]]
"""Tensors that a network returns for a batch, each (B, ...), to others."""


@dataclass(frozen=True)
class Job:
    """What a run works with, settled before its first phase."""

    recipe: Recipe
    folder: Path
    images: ImageData
    processor: Any
    phases: Sequence[PhaseRun]
    data: PhaseData
    replay: Replay | None
    load: Callable[[], Any] | None  # the pretrained network with a new head; None for a model object of the caller's

    @property
    def held_out(self) -> dict[str, Dataset]:
        """Validation and test images, as far as there are any."""
        splits = self.images.splits
        return {split: splits[split] for split in ("validation", "test") if split in splits}


@dataclass(frozen=True)
class ForwardPass:
    """How images are passed through networks; see `compute`."""

    transform: Transform
    batch_size: int
    workers: int
    choose_run: Callable[[nn.Module, torch.Tensor], Run] | None = None

    @classmethod
    def evaluating(cls, transform: Transform, arguments: Mapping[str, Any], choose_run: Any = None) -> "ForwardPass":
        """As a phase with these arguments evaluates."""
        batch_size = arguments.get("per_device_eval_batch_size", EVAL_BATCH)
        workers = arguments.get("dataloader_num_workers", min(cpus_per_process(), 8))
        return cls(transform, batch_size, workers, choose_run)

    def over(
        self, splits: Mapping[str, Dataset], network: nn.Module, then: Then | None = None
    ) -> list[dict[str, np.ndarray]]:
        """For each tensor of `compute` its values (N, ...) by split."""
        examples = Examples(concatenate_datasets(list(splits.values())), self.transform.pixels)
        found = compute(
            network,
            examples,
            self.transform.floats,
            batch_size=self.batch_size,
            workers=self.workers,
            choose_run=self.choose_run,
            then=then,
        )
        return [divided(array, splits) for array in found]

    def first_pixels(self, rows: Dataset, device: torch.device) -> torch.Tensor:
        """The first image, (1, C, H, W)."""
        return self.transform.floats(Examples(rows, self.transform.pixels)[0]["pixel_values"][None].to(device))


@dataclass(frozen=True)
class JointPass:
    """What is computed in the pass that scores a result."""

    network: nn.Module  # pixels to a flat tuple of tensors
    then: Then  # makes the result's logits of these, followed by other tensors
    take: Callable[[list[dict[str, np.ndarray]]], None]  # gets the values of the other tensors by split


@dataclass(frozen=True)
class Result:
    """The model that a run ends with, reopened from its folder."""

    folder: Path  # of the model, or of the adapter where nothing was merged
    model: Any  # on the device, in evaluation mode
    processor: Any
    forward: ForwardPass
    phases: Sequence[PhaseResult]
    selection: Selection
    scores: Mapping[str, Scores]  # by split; empty until they are computed


class Evaluator(Protocol):
    """Measures a run; every process calls every method, in this order.

    Attributes:
        name: Its key in metrics.json, in the log, and in the seconds that a run notes.
    """

    name: str

    def after_phase(self, job: Job, phase: PhaseRun, network: Any) -> None:
        """Measure the network after a phase, without adapter; leave it as it was."""

    def before_saving(self, job: Job, network: Any) -> None:
        """Look at the network that the run ends with; only weight interpolation changes it."""

    def join_pass(self, job: Job, result: Result) -> JointPass | None:
        """What to compute in the same pass over the held-out images that scores the result, if anything."""

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """Measure the result; the main process returns the section of metrics.json, None where there is none."""


def score_held_out(job: Job, result: Result, joint: JointPass | None) -> dict[str, Scores]:
    """Score a result, and compute in the same pass what an evaluator asked for; the same on every process."""
    splits = job.held_out
    if not splits:
        return {}
    if joint is None:
        (logits,) = result.forward.over(splits, Logits(result.model))
    else:
        logits, *others = result.forward.over(splits, joint.network, joint.then)
        joint.take(others)
    return measure_logits(logits, job)


def measure_logits(logits: Mapping[str, np.ndarray], job: Job) -> dict[str, Scores]:
    """Scores of logits (N, K) by split."""
    is_multi_label = job.data.is_multi_label
    return measure_splits(logits if is_multi_label else {split: softmax(part) for split, part in logits.items()}, job)


def measure_splits(values: Mapping[str, np.ndarray], job: Job) -> dict[str, Scores]:
    """Scores of probabilities (N, K) by split, or multi-label of logits.

    The thresholds of labels are those that are best on the validation images.
    """
    splits, thresholds = job.held_out, None
    if "validation" in values and job.data.is_multi_label:
        thresholds = choose_thresholds(sigmoid(values["validation"]), label_array(splits["validation"]))
    return {split: measured(part, splits[split], job.images.labels, thresholds) for split, part in values.items()}
