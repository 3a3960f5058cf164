"""Without a recipe: what to train, by rule, from facts on images, network and machine and a budget of time."""

import copy
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from hfft.data.images.decoding import decode_row
from hfft.data.images.resize_mode import fit_processor
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.reading import ImageData
from hfft.errors import DataError, RecipeError
from hfft.model.anatomy import dissect
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.system.machine import cpus_per_process
from hfft.training.plan import prepare_phase
from hfft.training.precision import step_seconds
from hfft.training.solved_head import solvable_head

_TIMED = 8  # images
_USED = 0.85  # share of the budget that is planned: predictions are no better
_SOLVED = 250  # images that EfficientNet-Lite0 encodes while 10 heads are solved on 400 rows of features
_OVERHEAD = 15.0  # seconds of a run that depend on nothing: its start, card, figures and page
_RETAINED = 3 * 128  # images that are encoded to measure what the network has kept, before and after two phases
_REPLAYED = 0.25  # share of a step above which what is frozen is surely replayed; replay itself asks for 0.2
_VIEWS = 2  # recordings of each training image, as `replay.views: auto` has it
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 10  # of the phase that trains blocks
_FEW = 1000  # training images, below which an epoch has so few steps that more of them are taken
_FEW_HELD_OUT = 500  # validation images, below which accuracy is coarse
_MIRRORED = re.compile(r"left|right|clockwise|port|starboard", re.IGNORECASE)

# Free weights, from those that need most time: Hub id, seconds of budget per image that are worth it on a CPU, why.
_CHECKPOINTS = (
    (
        "facebook/dinov2-small",
        0.6,
        "ViT-S/14, Apache-2.0: features made to be used as they are (hf.co/papers/2304.07193)",
    ),
    ("microsoft/resnet-18", 0.0, "ResNet-18, Apache-2.0: the smaller of the two"),
)
_FOR_ACCELERATORS = (
    "facebook/dinov2-base",
    "ViT-B/14, Apache-2.0: features made to be used as they are (hf.co/papers/2304.07193)",
)


@dataclass(frozen=True)
class Setting:
    """A key of a recipe, its value, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Facts:
    """What the choices depend on; seconds are per image, measured on this machine."""

    images: Mapping[str, int]  # by split
    labels: Sequence[str]
    blocks: int  # of the network
    is_convolutional: bool
    has_linear_head: bool  # one layer, so that it can be solved
    sides: Sequence[int]  # of the images as the network takes them, and smaller ones that it would take
    read: float  # to read an image and prepare it
    encode: float  # the same, and to pass it through the whole network
    step: Callable[[int], float]  # last blocks that train -> a training step behind the split point
    started: float  # seconds from the start of this process until the run itself begins


@dataclass(frozen=True)
class Proposal:
    """What to train, and the seconds that each stage should take."""

    choices: tuple[Setting, ...]
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())


def measure_facts(recipe: Recipe, images: ImageData, model: Any, processor: Any, *, begun: float) -> Facts:
    """Facts on images, network and machine, by some images that are timed; `begun` is when the choice began."""
    processor = fit_processor(processor, model.config, recipe.data)
    transform, rows = evaluation_transform(processor), images.splits["train"]
    device = PartialState().device
    model = model.to(device).eval()
    read, pixels = 0.0, []
    for row in np.linspace(0, len(rows) - 1, min(_TIMED, len(rows))).astype(int).tolist():
        started = time.perf_counter()
        with suppress(DataError):  # which the run's own audit tells of
            pixels.append(transform(decode_row(rows[row])))
            read += time.perf_counter() - started
    if not pixels:
        raise DataError(f"{recipe.data.source}: none of the first images can be read; `hfft check-data` says why")
    read /= len(pixels) * cpus_per_process()  # as many processes read
    batch = torch.stack(pixels).to(device)  # (B, C, H, W)
    forward = []
    for _ in range(3):  # the first warms up
        started = time.perf_counter()
        with torch.inference_mode():
            model(pixel_values=batch).logits.cpu()  # waits for an accelerator
        forward.append(time.perf_counter() - started)
    is_convolutional = sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1
    side = batch.shape[-1]
    # Convolutions take any size; a network with position embeddings is better left at its own.
    smaller = [32 * round(share * side / 32) for share in (0.75, 0.5)] if is_convolutional and side >= 128 else []
    return Facts(
        images={split: len(part) for split, part in images.splits.items()},
        labels=images.labels,
        blocks=len(dissect(model).blocks),
        is_convolutional=is_convolutional,
        has_linear_head=solvable_head(prepare_phase(copy.deepcopy(model), PhaseSpec(name="head"))) is not None,
        sides=(side, *smaller),
        read=read,
        encode=min(forward) / len(pixels) + read,
        step=lambda blocks: step_seconds(model, PhaseSpec(name="last", unfreeze={"blocks": blocks}), batch),
        started=time.monotonic() - begun,
    )


def choose_checkpoint(*, has_accelerator: bool, seconds_per_image: float) -> Setting:
    """A checkpoint of the Hub for a device, and a budget shared among the images."""
    if has_accelerator:
        name, why = _FOR_ACCELERATORS
        return Setting("model.checkpoint", name, why)
    name, _, why = next(row for row in _CHECKPOINTS if seconds_per_image >= row[1])
    return Setting("model.checkpoint", name, f"{why}; the budget is {seconds_per_image:.2g} s per image on a CPU")


def propose(facts: Facts, minutes: float) -> Proposal:
    """Choose all but the checkpoint.

    As many blocks train as leave time for enough epochs: first a third of them, then a sixth, then one; the head alone
    where that is too slow, too. What is in front of a third can be replayed, which hardly pays for more. Images become
    smaller where not even the head can be trained at the checkpoint's size.

    Raises:
        RecipeError: If nothing can be trained in that time; says what would do.
    """
    budget, sized = _USED * 60 * minutes, [_at(facts, side) for side in facts.sides]
    fitting = next((one for one in sized if sum(_seconds_of_head(one).values()) <= budget), None)
    if fitting is None:
        seconds = _seconds_of_head(sized[-1])
        least = math.ceil(10 * sum(seconds.values()) / _USED / 60) / 10
        stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        raise RecipeError(
            f"minutes: found {minutes:g}, and the least for these {sum(facts.images.values()):,} images is {least:g}: "
            f"{stages}; allow more, or choose a smaller checkpoint"
        )
    choices = [*_size(facts, fitting.sides[0]), *_shared(facts), *_head(facts)]
    seconds = _seconds_of_head(fitting)
    left = budget - sum(seconds.values()) - seconds["record"]  # what enters the blocks is recorded, too
    train, validation = facts.images["train"], facts.images.get("validation", 0)
    most = _MOST_EPOCHS if train >= _FEW else 2 * _MOST_EPOCHS
    for blocks in sorted({max(facts.blocks // part, 1) for part in (3, 6, facts.blocks)}, reverse=True):
        per_epoch = _step(fitting, blocks) * (train + validation / 3) if left > 0 else math.inf
        epochs = min(int(left / per_epoch), most)
        if epochs >= _LEAST_EPOCHS:
            seconds |= {"record": 2 * seconds["record"], "blocks": epochs * per_epoch}
            choices += _blocks(facts, blocks, epochs, per_epoch)
            break
    return Proposal(tuple(choices), seconds)


def _at(facts: Facts, side: int) -> Facts:
    """The facts with smaller images, whose time goes with their pixels."""
    scale = (side / facts.sides[0]) ** 2
    encode = facts.read + scale * (facts.encode - facts.read)
    return replace(facts, encode=encode, step=lambda blocks: scale * facts.step(blocks), sides=(side,))


def _step(facts: Facts, blocks: int) -> float:
    """Seconds per image of a training step, with what is frozen where it takes too little of it to be replayed."""
    step = facts.step(blocks)
    frozen = max(facts.encode - facts.read - step / 3, 0.0)  # a step is a forward pass, and backward twice that
    return step if frozen > _REPLAYED * (frozen + step) else step + frozen + facts.read


def _size(facts: Facts, side: int) -> list[Setting]:
    own = facts.sides[0]
    slow = sum(_seconds_of_head(facts).values()) / 60
    reason = f"at the checkpoint's {own} pixels the head alone would take {slow:.1f} min"
    return [] if side == own else [Setting("model.image_size", side, reason)]


def _seconds_of_head(facts: Facts) -> dict[str, float]:
    """What a run takes that trains the head alone, by stage."""
    train, validation = facts.images["train"], facts.images.get("validation", 0)
    held_out = validation + facts.images.get("test", 0)
    return {
        "start": facts.started + _OVERHEAD + facts.read * (train + held_out),  # the audit reads all images
        "record": facts.encode * (_VIEWS * train + validation),
        "head": facts.encode * (_SOLVED + 0.05 * train),
        "evaluate": facts.encode * (held_out + _RETAINED),
    }


def _shared(facts: Facts) -> list[Setting]:
    train, validation = facts.images["train"], facts.images.get("validation", 0)
    batch = 16 if train < 5000 else 32
    choices = [
        Setting(
            "training.per_device_train_batch_size",
            batch,
            f"{train:,} training images: {train // batch} steps an epoch",
        ),
        Setting("training.weight_decay", 0.01, "of kernels alone; AdamW's usual one (hf.co/papers/1711.05101)"),
    ]
    if 0 < validation < _FEW_HELD_OUT:
        reason = f"{validation} validation images: accuracy moves in steps of {100 / validation:.2g} %, this does not"
        choices.append(Setting("training.metric_for_best_model", "log_loss", reason))
    mirrored = [name for name in facts.labels if _MIRRORED.search(name)]
    if mirrored:
        choices.append(Setting("data.augment.flip", False, f"the class {mirrored[0]!r} may depend on the side"))
    elif all(len(name) <= 1 for name in facts.labels):
        choices.append(Setting("data.augment.flip", False, "the classes look like characters, which a mirror changes"))
    else:
        choices.append(
            Setting("data.augment.flip", True, "no class is named by a side, so that mirrored images keep theirs")
        )
    return choices


def _head(facts: Facts) -> list[Setting]:
    reason = "first the new head alone, on features as they were pretrained (hf.co/papers/2202.10054)"
    unfreeze = Setting("phases.head.unfreeze", "head", reason)
    if facts.has_linear_head:
        reason = "the head of least loss at once; its weight decay is chosen on validation images"
        return [unfreeze, Setting("phases.head.solver", "lbfgs", reason)]
    return [
        unfreeze,
        Setting(
            "phases.head.learning_rate", 0.01, "for new layers alone, with AdamW; no single linear layer to solve"
        ),
        Setting("phases.head.num_train_epochs", 10, "features are recorded once: an epoch takes a moment"),
        Setting("phases.head.lr_scheduler_type", "cosine", "ends at a small rate"),
    ]


def _blocks(facts: Facts, blocks: int, epochs: int, per_epoch: float) -> list[Setting]:
    rate, kind = (1e-4, "a convolutional network") if facts.is_convolutional else (5e-5, "a transformer")
    where = "phases.last-blocks"
    return [
        Setting(
            f"{where}.unfreeze",
            {"blocks": blocks},
            f"of {facts.blocks}: the most that leave time for {_LEAST_EPOCHS} epochs, a third at most",
        ),
        Setting(f"{where}.num_train_epochs", epochs, f"{per_epoch:.1f} s each, measured here"),
        Setting(f"{where}.learning_rate", rate, f"for {kind} with AdamW"),
        Setting(f"{where}.layer_decay", 0.8, "smaller for each block further down (hf.co/papers/2106.08254)"),
        Setting(f"{where}.lr_scheduler_type", "cosine", "ends at a small rate"),
        Setting(f"{where}.warmup_steps", 0.1, "a tenth of the steps, while AdamW learns its scales"),
    ]
