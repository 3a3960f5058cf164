"""Rows -> examples -> batches; every random decision is a function of seed, epoch and image.

At the end: the death of a process that reads them, recognized among other errors of the system.
"""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hfft.data.images.decoding import Decoded, decode_row
from hfft.data.sources.labels import is_multi_label, label_array
from hfft.errors import TrainingError, first_line

FILLER = -1  # index of an example that is none
IGNORED = -100  # label of an example that counts for nothing; torch's cross entropy and Trainer know it
_NAMED = "DataLoader worker"  # how torch begins to tell of a dead one
_RAISED_THERE = "Caught "  # and of what a worker raised that lives
_SIGNS = (OSError, EOFError, pickle.UnpicklingError)  # of a pipe or socket whose other end is gone
_DYING = 1.0  # seconds, at most, between the ends of a process's connections


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Decoded and transformed images of a split: an item depends on seed, epoch and index alone.

    So a run that was interrupted in the middle of an epoch goes on with the images it would have seen.
    """

    def __init__(
        self,
        rows: Dataset,
        transform: Callable[[Decoded], torch.Tensor],
        *,
        seed: int | None = None,
        targets: np.ndarray | None = None,
    ) -> None:
        """Wrap the rows, which have columns `image` (not decoded), `label` and `file`.

        Args:
            rows: Of one split.
            transform: Decoded image -> (C, H, W) tensor: a `Transform`, or its `pixels` alone, which are four times
                smaller on their way from a worker; whoever takes the batch calls `floats`.
            seed: Seeds the transform; None for a transform without random decisions.
            targets: Shares of the classes in the place of the labels, (N, K) float32.
        """
        self.labels: Any = targets
        if targets is None:
            self.labels = label_array(rows).astype(np.float32) if is_multi_label(rows) else rows["label"][:]
        self.rows = rows
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by living workers too

    def __len__(self) -> int:
        """Images in the split."""
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random decisions the next items take."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch whose random decisions the next items take."""
        return int(self._epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (C, H, W), `label`, and the `key` of its random decisions, None where there are none.

        FILLER gives the first image, with a label that counts for nothing.
        """
        if index == FILLER:
            return {**self[0], "label": ignored_like(self.labels[0])}
        index = int(index)
        image, label = decode_row(self.rows[index]), self.labels[index]
        if self.seed is None:
            return {"pixel_values": self.transform(image), "label": label, "key": None}
        key = (self.seed, self.epoch, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(key))
            pixels = self.transform(image)
        return {"pixel_values": pixels, "label": label, "key": key}


class EpochOrder(torch.utils.data.Sampler[int]):
    """Every image of an epoch once, shuffled as Accelerate's SeedableRandomSampler does, then fillers.

    `Collator` and the loss leave fillers out; Accelerate would take images twice to fill the last batches.
    """

    def __init__(self, examples: Examples, *, seed: int, multiple: int, chances: torch.Tensor | None = None) -> None:
        """Fill up to a multiple of a number; with `chances`, (N,), N images are drawn with these frequencies."""
        self._chances, self._examples, self._seed = chances, examples, seed
        self._fillers = -len(examples) % multiple

    def __len__(self) -> int:
        """Images and fillers."""
        return len(self._examples) + self._fillers

    def __iter__(self) -> Iterator[int]:
        """The indices of the examples' epoch."""
        generator = torch.Generator().manual_seed(self._seed + self._examples.epoch)
        count = len(self._examples)
        if self._chances is None:
            yield from torch.randperm(count, generator=generator).tolist()
        else:
            yield from torch.multinomial(self._chances, count, replacement=True, generator=generator).tolist()
        yield from [FILLER] * self._fillers


class Collator:
    """Examples -> a batch of `pixel_values` (B, C, H, W) and `labels`: (B,) integers, or (B, K) shares where it mixes.

    Pixels stay 8-bit if they were, but for those of mixup.
    """

    def __init__(
        self,
        mixup: float = 0.0,
        classes: int = 0,
        floats: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        cutmix: float = 0.0,
    ) -> None:
        """Mix pairs of training images by a share of the Beta distribution of these alphas; 0 is off.

        Mixing needs the number of classes K, and mixup of 8-bit pixels the examples' `Transform.floats`.
        """
        self.mixup, self.cutmix, self.classes, self.floats = mixup, cutmix, classes, floats

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the examples that count, and mix training examples each with its mirror in the batch."""
        examples = without_fillers(examples)
        pixels = torch.stack([example["pixel_values"] for example in examples])  # (B, C, H, W)
        labels = stack_labels(examples)  # (B,) or (B, K)
        keys = tuple(number for example in examples for number in example["key"] or ())
        if not (self.mixup or self.cutmix) or not keys:
            return {"pixel_values": pixels, "labels": labels}
        rng = np.random.default_rng(_mix(keys))
        cuts = self.cutmix > 0 and (self.mixup == 0 or bool(rng.random() < 0.5))
        if not cuts and self.floats is not None:
            pixels = self.floats(pixels)
        if labels.flatten()[0] == IGNORED:
            return {"pixel_values": pixels, "labels": torch.full((1, self.classes), float(IGNORED))}
        targets = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, self.classes)
        targets = targets.float()  # (B, K)
        if cuts:
            pixels, share = _cut_mix(pixels, float(rng.beta(self.cutmix, self.cutmix)), rng)
        else:
            share = float(rng.beta(self.mixup, self.mixup))
            pixels = share * pixels + (1 - share) * pixels.flip(0)
        return {"pixel_values": pixels, "labels": share * targets + (1 - share) * targets.flip(0)}


def _cut_mix(pixels: torch.Tensor, share: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Images (B, C, H, W), each with a rectangle of its mirror in the batch, and the share of the area that is left.

    The rectangle has the shape of the image and any place; what is outside of the image is cut off.
    """
    half, bounds = 0.5 * (1 - share) ** 0.5, []
    for side in pixels.shape[-2:]:
        center = int(rng.integers(side))
        bounds.append((max(center - int(half * side), 0), min(center + int(half * side), side)))
    (top, bottom), (left, right) = bounds
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (pixels.shape[-2] * pixels.shape[-1])


def ignored_like(label: Any) -> Any:
    """A label of the same form that counts for nothing."""
    return IGNORED if np.ndim(label) == 0 else np.full(np.shape(label), IGNORED, dtype=np.float32)


def without_fillers(examples: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The examples that count; one filler where there is no other."""
    return [example for example in examples if np.ravel(example["label"])[0] != IGNORED] or examples[:1]


def stack_labels(examples: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Class indices (B,), or shares of the classes (B, K) float32."""
    return torch.from_numpy(np.stack([example["label"] for example in examples]))


def chances_of(labels: Sequence[int], sampler: str) -> torch.Tensor | None:
    """Relative frequency of each image in training, (N,), by its class index; None for the sampler `shuffle`.

    `balanced` draws as often from each class, `sqrt` is half way.
    """
    if sampler == "shuffle":
        return None
    counts = np.bincount(labels)
    power = 1.0 if sampler == "balanced" else 0.5
    return torch.from_numpy(counts[np.asarray(labels)].astype(np.float64) ** -power)


def _mix(numbers: tuple[int, ...]) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def worker_deaths_explained(title: str, advice: str) -> Iterator[None]:
    """Raise a TrainingError, with a title and advice, in the place of torch's error for a worker that was killed."""
    try:
        with dead_workers_named():
            yield
    except RuntimeError as error:
        if _NAMED not in str(error):
            raise
        raise TrainingError(
            f"{title}: {first_line(error).rstrip('. ')}. A process that reads images died, most often for "
            f"lack of memory or of shared memory; {advice}"
        ) from error


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Raise torch's own error for a worker that was killed, whatever its end broke first.

    Depending on the moment, torch says that a worker was killed or exited, or a connection to it breaks.

    Raises:
        RuntimeError: `DataLoader worker (pid(s) N) exited unexpectedly`.
    """
    try:
        yield
    except _SIGNS as error:
        dead = [] if str(error).startswith(_RAISED_THERE) else _dead_workers(error)
        if not dead:
            raise
        raise RuntimeError(f"{_NAMED} (pid(s) {', '.join(map(str, dead))}) exited unexpectedly") from error


def _dead_workers(error: BaseException) -> list[int]:
    """Process numbers of dead workers of the DataLoader that an error came through."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        workers = getattr(frame.f_locals.get("self"), "_workers", ())
        if workers and frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            ended = wait([worker.sentinel for worker in workers], _DYING)
            return [worker.pid for worker in workers if worker.sentinel in ended]
    return []
