"""The activation cache of a run: recordings by a key of all that they depend on, found, given room and filled."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hfft.data.images.batches import Examples, dead_workers_named
from hfft.errors import TrainingError
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import ReplaySpec
from hfft.replay.dataset import ActivationDataset
from hfft.replay.engine import EAGER, Run
from hfft.replay.split_point import SplitPoint
from hfft.replay.store import Leaf, Recording, RecordingFiles, find_recording, locked, make_room, plan_recordings
from hfft.system.distributed import meet, on_main
from hfft.system.machine import cpus_per_process, describe_arithmetic
from hfft.system.progress import bar

_CORES, _MOST_THREADS = 4, 4  # one thread writes per so many cores; each holds a file in memory

Tensors = Sequence[torch.Tensor]
Compute = Callable[[Tensors], Sequence[Tensors]]
"""Pixels or activations of B examples -> for each recording the tensors of B rows; B never changes."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a config says that changes nothing in front of the head.
_LABELS = ("id2label", "label2id", "label_names", "num_labels", "num_classes", "problem_type")
_SAVED = ("architectures", "_name_or_path", "transformers_version", "dtype", "use_cache")


@dataclass(frozen=True, kw_only=True)
class FrozenPass:
    """What a phase computes activations with, and of which images: `train`, and `validation` if there is any."""

    network: Any  # as the phase trains it, on the device
    splits: Mapping[str, Examples]
    floats: Callable[[torch.Tensor], torch.Tensor]  # pixels of a batch to what the network takes
    device: torch.device
    autocast: torch.dtype | None  # what the phase computes in; None is float32
    batch_size: int  # images per forward pass of training
    workers: int
    title: str

    def pixels(self, count: int) -> torch.Tensor:
        """The first training images, over again where there are fewer, (count, C, H, W), on the device."""
        examples = self.splits["train"]
        images = [examples[number]["pixel_values"] for number in range(min(count, len(examples)))]
        pixels = torch.stack([images[number % len(images)] for number in range(count)])
        return self.floats(pixels.to(self.device))


@dataclass(frozen=True)
class View:
    """One version of the images of a split: for training images, the augmentation of epoch `number`."""

    split: str
    number: int = 0


@dataclass(frozen=True)
class Origin:
    """What activations are made from, apart from the network: images, processor, augmentation and packages."""

    fingerprints: Mapping[str, str]
    processor: str
    augment: AugmentSpec
    seed: int
    versions: Mapping[str, str]

    @property
    def is_random(self) -> bool:
        """Whether a training image looks different in each epoch."""
        return self.augment != AugmentSpec()

    def pixels(self, view: View) -> dict[str, Any]:
        """All that the pixels of a view depend on."""
        images = self.fingerprints[view.split]
        content = {"images": images, "processor": self.processor, "versions": dict(self.versions)}
        if view.split == "train" and self.is_random:
            content |= {"augment": vars(self.augment), "seed": self.seed, "view": view.number}
        return content


@dataclass(frozen=True)
class Program:
    """What computes the activations at some split points, in forward order, for a batch of images at once."""

    leaves: Mapping[SplitPoint, Sequence[Leaf]]
    run: Run
    engine: str
    batch: int


class ActivationCache:
    """A folder of recordings, as one run uses it for its images; all its methods are called in every process."""

    def __init__(self, spec: ReplaySpec, folder: Path, origin: Origin) -> None:
        """Use a folder, which need not be there yet."""
        self.folder = folder
        self.spec = spec
        self.origin = origin

    @property
    def is_exact(self) -> bool:
        """Whether rows must be those of the plain run to the last bit."""
        return self.spec.engine == EAGER

    def leaf(self, tensor: torch.Tensor) -> Leaf:
        """How a tensor that enters a split point, (B, ...), is kept."""
        return Leaf(_DTYPES.get(self.spec.dtype, tensor.dtype), tuple(tensor.shape[1:]))

    def find(
        self, frozen: FrozenPass, split_point: SplitPoint, views: Sequence[View], engines: Sequence[str]
    ) -> tuple[dict[View, Recording], str] | None:
        """All these views at a split point, and the first of some engines that recorded them; None if a view lacks."""

        def search() -> tuple[dict[View, Recording], str] | None:
            for engine in engines:
                found: dict[View, Recording] = {}
                for view in views:
                    key = self.key(frozen, split_point, view, engine)
                    with locked(self.folder, key):
                        recording = find_recording(self.folder, key, len(frozen.splits[view.split]))
                    if recording is None:
                        break
                    found[view] = recording
                else:
                    return found, engine
            return None

        return on_main(search)

    def has_room(
        self,
        needed: int,
        frozen: FrozenPass,
        split_points: Sequence[SplitPoint],
        views: Sequence[View],
        engines: Sequence[str],
    ) -> bool:
        """Whether so many bytes fit into the budget and on the disk, once older recordings than these have gone."""
        kept = list(product(split_points, views, engines))
        budget = self.spec.budget_bytes
        return on_main(lambda: make_room(self.folder, needed, budget, keep=[self.key(frozen, *one) for one in kept]))

    def fill(
        self,
        frozen: FrozenPass,
        view: View,
        program: Program,
        wanted: Sequence[SplitPoint],
        source: Recording | None = None,
    ) -> int:
        """Record a view at those split points of a program that are wanted, in one pass.

        The program begins at the pixels, or at an earlier split point where `source` is what enters that.

        Returns:
            Images that were computed; OSError in every process, if one of them couldn't write.
        """
        examples = frozen.splits[view.split]
        examples.set_epoch(view.number)
        keys = on_main(lambda: [self.key(frozen, point, view, program.engine) for point in wanted])
        with self._alone(keys):
            found = on_main(lambda: [find_recording(self.folder, key, len(examples)) is not None for key in keys])
            missing = [point for point, is_there in zip(wanted, found, strict=True) if not is_there]
            if not missing:
                return 0
            leaves = {key: program.leaves[point] for point, key in zip(wanted, keys, strict=True) if point in missing}
            recordings = plan_recordings(self.folder, leaves, rows=len(examples), batch=program.batch)

            def compute(inputs: Tensors) -> list[list[torch.Tensor]]:
                outputs = iter(program.run(*(inputs if source is not None else [frozen.floats(inputs[0])])))
                rows = {point: [(next(outputs), leaf) for leaf in leaves] for point, leaves in program.leaves.items()}
                return [[_kept(*pair) for pair in rows[point]] for point in missing]

            computed = record_activations(
                recordings,
                compute,
                examples if source is None else ActivationDataset([source], range(len(source))),
                batch=program.batch,
                workers=frozen.workers if source is None else 0,
                title=f"{frozen.title}: recording {view.split} images",
            )
            on_main(lambda: [files.finish() for files in recordings])
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

    def key(self, frozen: FrozenPass, split_point: SplitPoint, view: View, engine: str) -> str:
        """Name of a recording: a hash of all that its rows depend on; the main process's counts."""
        config = frozen.network.config
        content = {
            "network": split_point.fingerprint,
            "config": {name: value for name, value in config.to_dict().items() if name not in (*_LABELS, *_SAVED)},
            "attention": getattr(config, "_attn_implementation", None),
            "entering": split_point.path,
            "pixels": self.origin.pixels(view),
            "precision": str(frozen.autocast),
            "arithmetic": describe_arithmetic(frozen.device, to_the_bit=self.is_exact),
            "batch": frozen.batch_size if self.is_exact else None,  # bits depend on it, too
            "engine": engine,
            "dtype": self.spec.dtype,
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _kept(tensor: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    kept = tensor.to(leaf.dtype)
    if kept.dtype != tensor.dtype and not kept.isfinite().all():
        raise TrainingError(f"replay.dtype: {leaf.dtype} can't hold these activations; bfloat16 has a wider range")
    return kept


def record_activations(
    recordings: Sequence[RecordingFiles],
    compute: Compute,
    examples: Examples | ActivationDataset,
    *,
    batch: int,
    workers: int,
    title: str,
) -> int:
    """Write what is missing of recordings that were planned together; to finish them is left to the caller.

    The examples are the images, or what enters an earlier split point; the last batch is filled up with copies.

    Returns:
        Images that all processes together computed; OSError in every process, if one of them couldn't write.
    """
    state = PartialState()
    first, stop = (len(examples) * (state.process_index + end) // state.num_processes for end in (0, 1))
    own = [span for span in recordings[0].spans if first <= span.start < stop]
    missing = {files: files.missing(own) for files in recordings}
    spans = [span for span in own if any(span in those for those in missing.values())]
    batches = [range(begin, min(begin + batch, span.stop)) for span in spans for begin in span[::batch]]
    problem: str | None = None
    threads = min(max(cpus_per_process() // _CORES, 1), _MOST_THREADS)
    pending: deque[Future[None]] = deque()
    try:
        with (
            dead_workers_named(),
            ThreadPoolExecutor(threads, "hfft-recording") as pool,
            bar(title, sum(map(len, batches))) as shown,
        ):
            outputs = _outputs(batches, compute, examples, batch=batch, workers=workers)
            for span in spans:
                blocks = [files.blocks(span) for files in recordings]
                for begin in range(0, len(span), batch):
                    for block, tensor in zip(chain(*blocks), chain(*next(outputs)), strict=True):
                        block[begin : begin + batch] = tensor[: len(span) - begin]
                    shown.update(min(batch, len(span) - begin))
                complete = [pair for pair in zip(recordings, blocks, strict=True) if span in missing[pair[0]]]
                pending.extend(pool.submit(files.write, span, tensors) for files, tensors in complete)
                while len(pending) > threads:  # no more files are held in memory
                    pending.popleft().result()
            for write in pending:
                write.result()
    except OSError as error:
        problem = str(error)
    meet()  # one of them may have a file more to write
    gathered = gather_object([(problem, sum(map(len, batches)))])
    problems = [found for found, _ in gathered if found is not None]
    if problems:
        raise OSError(problems[0])
    return sum(count for _, count in gathered)


def _outputs(
    batches: Sequence[range], compute: Compute, examples: Examples | ActivationDataset, *, batch: int, workers: int
) -> Iterator[Sequence[Tensors]]:
    """What is computed from each batch; one batch is computed while the last one is written."""
    device = torch.device(str(PartialState().device))
    pins = device.type == "cuda"
    sampler = [list(rows) for rows in batches]
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=_inputs, num_workers=workers, pin_memory=pins)

    def computed(inputs: Tensors) -> Sequence[Tensors]:
        return compute([_filled(tensor.to(device, non_blocking=pins), batch) for tensor in inputs])

    with ThreadPoolExecutor(1) as ahead:
        waiting: deque[Future[Sequence[Tensors]]] = deque()
        for inputs in loader:
            waiting.append(ahead.submit(computed, inputs))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        for last in waiting:
            yield last.result()


def _inputs(examples: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    rows = [example.get("activations") or (example["pixel_values"],) for example in examples]
    return [torch.stack(leaf) for leaf in zip(*rows, strict=True)]  # each (B, ...)


def _filled(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:].expand(batch - len(tensor), *tensor.shape[1:])])
