"""The recordings of a run: what they are called, which are there, whether there is room, and filling them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from hfft.data.images.batches import Examples
from hfft.errors import TrainingError
from hfft.recipe.spec import AugmentSpec, ReplaySpec
from hfft.replay.dataset import ActivationDataset
from hfft.replay.engine import EAGER
from hfft.replay.extraction import fill
from hfft.replay.recordings import Leaf, Recorder, Recording, find_recording, locked, make_room
from hfft.replay.split_point import SplitPoint
from hfft.system.distributed import meet, on_main
from hfft.system.machine import describe_arithmetic
from hfft.training.phase_data import PhaseData

Run = Callable[..., tuple[torch.Tensor, ...]]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a config says that changes nothing in front of the head; transformers sets the last two when it saves a model.
_BESIDES = (
    "id2label",
    "label2id",
    "label_names",
    "num_labels",
    "num_classes",
    "problem_type",
    "architectures",
    "_name_or_path",
    "transformers_version",
    "dtype",
    "use_cache",
)
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Origin:
    """What activations are made from, besides the network.

    Attributes:
        fingerprints: Split name to a hash of its images.
        processor: The image processor, in words.
        augment: Of training images.
        seed: Of the augmentation.
        versions: Of the packages that compute them.
    """

    fingerprints: Mapping[str, str]
    processor: str
    augment: AugmentSpec
    seed: int
    versions: Mapping[str, str]

    @property
    def is_random(self) -> bool:
        """Whether a training image looks different in each epoch."""
        return self.augment != AugmentSpec()

    def pixels(self, place: "Place") -> dict[str, Any]:
        """All that the pixels of a split and view depend on."""
        content = {
            "images": self.fingerprints[place.split],
            "processor": self.processor,
            "versions": dict(self.versions),
        }
        if place.split == "train" and self.is_random:
            content |= {"augment": vars(self.augment), "seed": self.seed, "view": place.view}
        return content


@dataclass(frozen=True)
class Place:
    """One version of the images of a split: the augmentation of epoch `view` for training images."""

    split: str
    view: int = 0


@dataclass(frozen=True)
class Boundary:
    """A split point, and how many views of each training image a phase wants there."""

    split_point: SplitPoint
    views: int

    def wants(self, place: Place) -> bool:
        """Whether the phase needs these images."""
        return place.split != "train" or place.view < self.views


@dataclass(frozen=True)
class Job:
    """A phase that may be replayed; `model` as `prepare_phase` left it, on the device."""

    model: Any
    data: PhaseData
    arguments: TrainingArguments
    title: str

    @property
    def splits(self) -> dict[str, Examples]:
        """Images by split name."""
        validation = self.data.validation
        return {"train": self.data.train} | ({} if validation is None else {"validation": validation})

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that the phase computes in, if it isn't float32."""
        return torch.bfloat16 if self.arguments.bf16 else torch.float16 if self.arguments.fp16 else None

    def precision(self) -> torch.autocast:
        """What the phase computes under."""
        return torch.autocast(self.arguments.device.type, self.autocast, enabled=self.autocast is not None)

    def pixels(self, count: int) -> torch.Tensor:
        """The first training images, over again where there are fewer, (count, C, H, W), on the device."""
        examples = self.data.train
        images = [examples[number]["pixel_values"] for number in range(min(count, len(examples)))]
        pixels = torch.stack([images[number % len(images)] for number in range(count)])
        return self.data.floats(pixels.to(self.arguments.device))


@dataclass(frozen=True)
class Computation:
    """What computes the activations at some split points.

    Attributes:
        leaves: What enters each split point, in forward order.
        run: Pixels of a batch, or the tensors of an earlier split point -> what enters each split point.
        engine: Name of what runs.
        batch: Images at once.
    """

    leaves: Mapping[SplitPoint, Sequence[Leaf]]
    run: Run
    engine: str
    batch: int


class ActivationCache:
    """A folder of recordings, as one run uses it."""

    def __init__(self, spec: ReplaySpec, folder: Path, origin: Origin) -> None:
        """Choose the folder.

        Args:
            spec: The recipe's.
            folder: Where recordings are kept.
            origin: What the images are made from.
        """
        self.folder = folder
        self._spec = spec
        self._origin = origin

    def find(
        self, job: Job, split_point: SplitPoint, places: Sequence[Place], engine: str
    ) -> dict[Place, Recording] | None:
        """The recordings of these images at a split point, if all are there and whole."""
        keys = {place: self.key(job, split_point, place, engine) for place in places}

        def look() -> dict[Place, Recording] | None:
            found: dict[Place, Recording] = {}
            for place, key in keys.items():
                with locked(self.folder, key):
                    recording = find_recording(self.folder, key)
                if recording is None:
                    return None
                found[place] = recording
            return found

        return on_main(look)

    def leaf(self, tensor: torch.Tensor) -> Leaf:
        """How a tensor that enters a split point, (B, ...), is kept."""
        return Leaf(_DTYPES.get(self._spec.dtype, tensor.dtype), tuple(tensor.shape[1:]))

    def has_room(self, needed: int, keep: Sequence[str] = ()) -> bool:
        """Whether so many bytes fit into the budget and on the disk, once recordings that are old have gone."""
        return on_main(lambda: make_room(self.folder, needed, self._spec.budget_bytes, keep=keep))

    def fill(
        self,
        job: Job,
        place: Place,
        computation: "Computation",
        wanted: Sequence[SplitPoint],
        source: Recording | None = None,
    ) -> int:
        """Record some images at some split points in one pass.

        Args:
            job: The phase.
            place: The images.
            computation: What computes the activations.
            wanted: Those of its split points that are to be recorded.
            source: What enters an earlier split point, where the computation begins there and not at the pixels.

        Returns:
            Images that were computed for it; 0 where all had been recorded before.

        Raises:
            OSError: In every process, if one of them couldn't write.
        """
        leaves, batch, engine = computation.leaves, computation.batch, computation.engine
        examples = job.splits[place.split]
        examples.set_epoch(place.view)
        keys = {split_point: self.key(job, split_point, place, engine) for split_point in wanted}
        with self._alone(list(keys.values())):
            there = on_main(lambda: [find_recording(self.folder, key) is not None for key in keys.values()])
            missing = [split_point for split_point, is_there in zip(keys, there, strict=True) if not is_there]
            recorders = {
                split_point: Recorder(
                    self.folder,
                    keys[split_point],
                    rows=len(examples),
                    leaves=leaves[split_point],
                    about=self._about(job, split_point, place, engine),
                    batch=batch,
                )
                for split_point in missing
            }

            def compute(inputs: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
                if source is None:
                    inputs = [job.data.floats(inputs[0])]
                outputs = dict(zip(leaves, divided(computation.run(*inputs), leaves), strict=True))
                return [
                    [_kept(*pair) for pair in zip(outputs[split_point], leaves[split_point], strict=True)]
                    for split_point in missing
                ]

            computed = 0
            if missing:
                workers = job.arguments.dataloader_num_workers if source is None else 0
                rows = examples if source is None else ActivationDataset([source], range(len(source)))
                title = f"{job.title}: recording {place.split} images"
                computed = fill(list(recorders.values()), compute, rows, batch=batch, workers=workers, title=title)
                on_main(lambda: [recorder.finish() for recorder in recorders.values()])
        return computed

    @contextmanager
    def _alone(self, keys: Sequence[str]) -> Iterator[None]:
        """Let no other run fill these recordings meanwhile; the main process holds the locks for all of this run."""
        with ExitStack() as held:
            if PartialState().is_main_process:
                for key in sorted(keys):  # in one order, so that two runs don't wait for each other
                    held.enter_context(locked(self.folder, key))
            meet()
            yield

    @property
    def is_exact(self) -> bool:
        """Whether rows must be those of the plain run to the last bit."""
        return self._spec.engine == EAGER

    def key(self, job: Job, split_point: SplitPoint, place: Place, engine: str) -> str:
        """Name of a recording, the same in every process: a hash of all that its rows depend on."""
        return on_main(lambda: self._key(job, split_point, place, engine))

    def _key(self, job: Job, split_point: SplitPoint, place: Place, engine: str) -> str:
        config = {name: value for name, value in job.model.config.to_dict().items() if name not in _BESIDES}
        content = {
            "network": split_point.fingerprint,
            "config": config,
            "attention": getattr(job.model.config, "_attn_implementation", None),
            "entering": split_point.path,
            "pixels": self._origin.pixels(place),
            "precision": str(job.autocast),
            "arithmetic": describe_arithmetic(job.arguments.device, to_the_bit=self.is_exact),
            "batch": job.arguments.per_device_train_batch_size if self.is_exact else None,  # bits depend on it, too
            "engine": engine,
            "dtype": self._spec.dtype,
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def _about(self, job: Job, split_point: SplitPoint, place: Place, engine: str) -> dict[str, Any]:
        config = job.model.config
        return {
            "network": f"{config.model_type} {config.name_or_path}".strip(),
            "entering": split_point.path,
            "split": place.split,
            "view": place.view,
            "precision": str(job.autocast or torch.float32).removeprefix("torch."),
            "engine": engine,
        }


def divided(
    outputs: Sequence[torch.Tensor], leaves: Mapping[SplitPoint, Sequence[Leaf]]
) -> list[Sequence[torch.Tensor]]:
    """What a Prefix returns, split point by split point."""
    ends = [0]
    for split_point in leaves:
        ends.append(ends[-1] + len(leaves[split_point]))
    return [outputs[begin:end] for begin, end in pairwise(ends)]


def _kept(tensor: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    kept = tensor.to(leaf.dtype)
    if kept.dtype != tensor.dtype and not kept.isfinite().all():
        raise TrainingError(f"replay.dtype: {leaf.dtype} can't hold these activations; bfloat16 has a wider range")
    return kept
