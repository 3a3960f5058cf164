"""A phase in its place in a run, and what it trains and evaluates on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from hfft.data.images.batches import Collator, Examples, chances_of
from hfft.data.images.first_batch import try_first_batch
from hfft.data.images.transforms import evaluation_transform, training_transform
from hfft.data.sources.labels import targets_of
from hfft.data.sources.reading import ImageData
from hfft.metrics.evaluate_modules import validating
from hfft.metrics.multilabel import metrics_of
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.replay.cache import FrozenPass
from hfft.training.losses import ImageLoss, loss_for


@dataclass(frozen=True)
class PhaseData:
    """What a phase trains and evaluates on.

    Attributes:
        train: Training images, as 8-bit pixels where the processor allows it.
        floats: Pixels of a batch to what the network takes.
        reduce: Trainer's preprocess_logits_for_metrics.
        measure: Trainer's compute_metrics.
        metrics: What it computes, by name, each from probabilities (N, K) and labels, (N,) or multi-label (N, K); the
            first is what a phase is judged by, unless it says otherwise.
        loss: Label smoothing to the loss.
        chances: How often each training image comes, (N,); each once per epoch when None.
        is_multi_label: Whether an image has any number of labels, each with a probability by itself.
    """

    train: Examples
    validation: Examples | None
    floats: Callable[[torch.Tensor], torch.Tensor]
    collate: Collator
    reduce: Callable[[Any, torch.Tensor], torch.Tensor]
    measure: Callable[[Any], dict[str, float]]
    metrics: Mapping[str, Callable[[np.ndarray, np.ndarray], float]]
    loss: Callable[[float], ImageLoss] = ImageLoss
    chances: torch.Tensor | None = None
    is_multi_label: bool = False

    def frozen_pass(self, network: Any, arguments: TrainingArguments, title: str) -> FrozenPass:
        """What replay computes activations with: a network as a phase trains it, and the phase's images."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return FrozenPass(
            network=network.to(arguments.device),
            splits={"train": self.train, **validation},
            floats=self.floats,
            device=arguments.device,
            autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            batch_size=arguments.per_device_train_batch_size,
            workers=arguments.dataloader_num_workers,
            title=title,
        )

    @property
    def headline(self) -> str:
        """Name of the metric that a phase is judged by, unless it says otherwise."""
        return next(iter(self.metrics))


def make_phase_data(images: ImageData, processor: Any, recipe: Recipe) -> PhaseData:
    """What the phases of a recipe train and evaluate on."""
    augment = recipe.data.augment
    train_with, evaluate_with = training_transform(processor, augment), evaluation_transform(processor)
    train, validation = images.splits["train"], images.splits.get("validation")
    reduce, measure = validating(len(images.labels), is_multi_label=images.is_multi_label)
    return PhaseData(
        train=Examples(train, train_with.pixels, seed=recipe.seed, targets=targets_of(train, len(images.labels))),
        validation=None if validation is None else Examples(validation, evaluate_with.pixels),
        floats=train_with.floats,
        collate=Collator(augment.mixup, len(images.labels), train_with.floats, cutmix=augment.cutmix),
        reduce=reduce,
        measure=measure,
        metrics=metrics_of(is_multi_label=images.is_multi_label),
        loss=loss_for(recipe, images),
        chances=None if images.is_multi_label else chances_of(train["label"][:], recipe.sampler),
        is_multi_label=images.is_multi_label,
    )


def draw_first_batch(
    file: Path, recipe: Recipe, images: ImageData, processor: Any, data: PhaseData | None = None
) -> None:
    """The first training images as a picture, if it isn't there; see `try_first_batch`."""
    data = make_phase_data(images, processor, recipe) if data is None else data
    try_first_batch(
        file,
        data.train,
        data.collate,
        processor=processor,
        classes=images.labels,
        seed=recipe.seed,
        chances=data.chances,
    )


@dataclass(frozen=True)
class PhaseRun:
    """A phase in its place in a run: its number, from 0, its folder, its title in the log, and the recipe's seed."""

    number: int
    spec: PhaseSpec
    folder: Path
    title: str
    seed: int
