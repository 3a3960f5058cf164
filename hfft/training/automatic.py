"""Without a recipe: what to train, by rule, from facts on images, network and machine and a budget of time."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfft.errors import RecipeError

_USED = 0.85  # share of the budget that is planned: predictions are no better
_OVERHEAD = 15.0  # seconds of a run that depend on nothing: its start, card, figures and page
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
    ("microsoft/resnet-18", 0.0, "ResNet-18, Apache-2.0: a CPU encodes some 30 images/s"),
)
_FOR_ACCELERATORS = (
    "facebook/dinov2-base",
    "ViT-B/14, Apache-2.0: features made to be used as they are (hf.co/papers/2304.07193)",
)


@dataclass(frozen=True)
class Choice:
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
    encode: float  # to read an image, prepare it, and pass it through the whole network
    step: Mapping[int, float]  # last blocks that train -> a training step behind the split point
    started: float  # seconds from the start of this process until the run itself begins


@dataclass(frozen=True)
class Proposal:
    """What to train, and the seconds that each stage should take."""

    choices: tuple[Choice, ...]
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())


def choose_checkpoint(*, has_accelerator: bool, seconds_per_image: float) -> Choice:
    """A checkpoint of the Hub for a device, and a budget shared among the images."""
    if has_accelerator:
        name, why = _FOR_ACCELERATORS
        return Choice("model.checkpoint", name, why)
    name, _, why = next(row for row in _CHECKPOINTS if seconds_per_image >= row[1])
    return Choice("model.checkpoint", name, f"{why}; the budget is {seconds_per_image:.2g} s per image on a CPU")


def propose(facts: Facts, minutes: float) -> Proposal:
    """Choose all but the checkpoint.

    As many blocks train as leave time for enough epochs: first half of them, then a quarter, then one; the head alone
    where that is too slow, too.

    Raises:
        RecipeError: If not even the head can be trained in that time; says what would do.
    """
    train, held_out = facts.images["train"], facts.images.get("validation", 0) + facts.images.get("test", 0)
    validation, budget = facts.images.get("validation", 0), _USED * 60 * minutes
    seconds = {
        "start": facts.started + _OVERHEAD,
        "record": facts.encode * (_VIEWS * train + validation),
        "head": 0.002 * train,
        "evaluate": facts.encode * held_out,
    }
    needed = sum(seconds.values())
    if needed > budget:
        least = math.ceil(10 * needed / _USED / 60) / 10
        stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        raise RecipeError(
            f"minutes: found {minutes:g}, and the least for these {train + held_out:,} images is {least:g}: {stages}; "
            "allow more, or choose a smaller checkpoint"
        )
    choices = [*_shared(facts), *_head(facts)]
    most = _MOST_EPOCHS if train >= _FEW else 2 * _MOST_EPOCHS
    for blocks, step in sorted(facts.step.items(), reverse=True):
        per_epoch = step * (train + validation / 3)
        left = budget - needed - seconds["record"]  # what enters the blocks is recorded, too
        epochs = min(int(left / per_epoch), most)
        if epochs >= _LEAST_EPOCHS:
            seconds |= {"record": 2 * seconds["record"], "blocks": epochs * per_epoch}
            choices += _blocks(facts, blocks, epochs, per_epoch)
            break
    return Proposal(tuple(choices), seconds)


def _shared(facts: Facts) -> list[Choice]:
    train, validation = facts.images["train"], facts.images.get("validation", 0)
    batch = 16 if train < 5000 else 32
    choices = [
        Choice(
            "training.per_device_train_batch_size",
            batch,
            f"{train:,} training images: {train // batch} steps an epoch",
        ),
        Choice("training.weight_decay", 0.01, "of kernels alone; AdamW's usual one (hf.co/papers/1711.05101)"),
    ]
    if 0 < validation < _FEW_HELD_OUT:
        reason = f"{validation} validation images: accuracy moves in steps of {100 / validation:.2g} %, this does not"
        choices.append(Choice("training.metric_for_best_model", "log_loss", reason))
    mirrored = [name for name in facts.labels if _MIRRORED.search(name)]
    if mirrored:
        choices.append(Choice("data.augment.flip", False, f"the class {mirrored[0]!r} may depend on the side"))
    elif all(len(name) <= 1 for name in facts.labels):
        choices.append(Choice("data.augment.flip", False, "the classes look like characters, which a mirror changes"))
    else:
        choices.append(
            Choice("data.augment.flip", True, "no class is named by a side, so that mirrored images keep theirs")
        )
    return choices


def _head(facts: Facts) -> list[Choice]:
    return [
        Choice(
            "phases.head.unfreeze",
            "head",
            "first the new head alone, on features as they were pretrained (hf.co/papers/2202.10054)",
        ),
        Choice("phases.head.learning_rate", "auto", "the best of a grid on validation images, trained at once"),
        Choice("phases.head.num_train_epochs", 10, "features are recorded once: an epoch takes a moment"),
        Choice("phases.head.lr_scheduler_type", "cosine", "ends at a small rate"),
    ]


def _blocks(facts: Facts, blocks: int, epochs: int, per_epoch: float) -> list[Choice]:
    rate, kind = (1e-4, "a convolutional network") if facts.is_convolutional else (5e-5, "a transformer")
    where = "phases.last-blocks"
    return [
        Choice(
            f"{where}.unfreeze",
            {"blocks": blocks},
            f"of {facts.blocks}: the most that leave time for {_LEAST_EPOCHS} epochs, half at most",
        ),
        Choice(f"{where}.num_train_epochs", epochs, f"{per_epoch:.1f} s each, measured here"),
        Choice(f"{where}.learning_rate", rate, f"for {kind} with AdamW"),
        Choice(f"{where}.layer_decay", 0.8, "smaller for each block further down (hf.co/papers/2106.08254)"),
        Choice(f"{where}.lr_scheduler_type", "cosine", "ends at a small rate"),
        Choice(f"{where}.warmup_steps", 0.1, "a tenth of the steps, while AdamW learns its scales"),
    ]
