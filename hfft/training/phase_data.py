"""A phase in its place in a run, and what it trains and evaluates on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfft.data.batches import Collator, Examples
from hfft.recipe.spec import PhaseSpec


@dataclass(frozen=True)
class PhaseData:
    """What a phase trains and evaluates on.

    Attributes:
        train: Training images.
        validation: Validation images, if there are any.
        collate: Examples to batches.
        measure: Trainer's compute_metrics.
        class_weights: Factor of each class in the loss, (K,); None for 1.
    """

    train: Examples
    validation: Examples | None
    collate: Collator
    measure: Callable[[Any], dict[str, float]]
    class_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """A phase in its place in a run.

    Attributes:
        number: From 0.
        spec: What it does.
        folder: Its folder.
        title: Shown beside the progress.
        seed: The recipe's.
    """

    number: int
    spec: PhaseSpec
    folder: Path
    title: str
    seed: int
