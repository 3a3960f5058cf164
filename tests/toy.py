"""Small separable images in memory, and what a phase needs of them."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

from hfft.data.images.batches import Collator, Examples
from hfft.data.images.transforms import evaluation_transform, training_transform
from hfft.data.sources.rows import row_features
from hfft.metrics.evaluate_modules import validating
from hfft.metrics.metrics import METRICS
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import PhaseSpec, ReplaySpec
from hfft.replay.cache import Origin
from hfft.replay.replay import Replay, RunPhases
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.phases import run_phase
from hfft.training.plan import duration, prepare_phase

CLASSES = ("red", "blue")


class StopAt(TrainerCallback):
    """Ctrl-C behind a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def picture(label: int, rng: np.random.Generator, side: int = 36) -> Image.Image:
    """Noise with a tint that tells the class; one image in six has none."""
    pixels = rng.integers(0, 140, (side, side, 3), dtype=np.uint8)
    if rng.random() > 1 / 6:
        pixels[..., 2 * label] += 80
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@functools.cache
def rows(count: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    content = [
        {"image": {"bytes": png(picture(k % 2, rng)), "path": None}, "label": k % 2, "file": f"{k:03d}"}
        for k in range(count)
    ]
    return Dataset.from_list(content, features=row_features(CLASSES))


def pixels(count: int) -> torch.Tensor:
    """The first images of `rows` as a network takes them: (count, 3, H, W)."""
    examples = Examples(rows(count), evaluation_transform(tiny.processor()))
    return torch.stack([examples[k]["pixel_values"] for k in range(count)])


def phase_data(
    train: int = 24,
    validation: int = 12,
    augment: AugmentSpec | None = None,
    seed: int = 0,
    *,
    eight_bit: bool = False,
    targets: np.ndarray | None = None,
) -> PhaseData:
    """Float pixels, as a plain Trainer takes them too; or 8-bit ones, as runs use them; perhaps shares of classes."""
    processor = tiny.processor()
    augment = augment or AugmentSpec()
    transform = training_transform(processor, augment)
    evaluate = evaluation_transform(processor)
    if eight_bit:
        assert transform.scale is not None
    train_with, evaluate_with = (part.pixels if eight_bit else part for part in (transform, evaluate))
    reduce, measure = validating(len(CLASSES))
    return PhaseData(
        train=Examples(rows(train), train_with, seed=seed, targets=targets),
        validation=Examples(rows(validation, seed=1), evaluate_with) if validation else None,
        floats=transform.floats,
        collate=Collator(augment.mixup, len(CLASSES), transform.floats, cutmix=augment.cutmix),
        reduce=reduce,
        measure=measure,
        metrics=METRICS,
    )


def run(
    model: Any,
    folder: Path,
    *,
    data: PhaseData | None = None,
    replay: ReplaySpec | None = None,
    callbacks: Any = (),
    **phase: Any,
) -> tuple[Any, Any]:
    """Run one phase with small defaults; replayed, its recordings lie beside its folder."""
    arguments = {
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "dataloader_num_workers": 0,
        **phase.pop("arguments", {}),
    }
    spec = PhaseSpec(name="p", **phase, arguments=arguments)
    phase = PhaseRun(number=0, spec=spec, folder=folder, title="test", seed=0)
    data = data or phase_data()
    feeding = None if replay is None else replay_of(replay, folder.parent / "recordings", [spec])
    return run_phase(model, phase, data, replay=feeding, callbacks=callbacks)


def replay_of(
    spec: ReplaySpec, folder: Path, phases: Sequence[PhaseSpec], augment: AugmentSpec | None = None
) -> Replay:
    """Replay of the images of `phase_data`."""
    origin = Origin({"train": "toy", "validation": "toy, too"}, "tiny", augment or AugmentSpec(), 0, {})
    return Replay(spec, folder, origin, RunPhases(phases, prepare_phase, duration))
