"""Replay: what enters the part that a phase trains is computed once, for this phase, later ones and later runs."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from hfft._version import __version__
from hfft.data.images.decoding import RULE
from hfft.model.fingerprint import hash_code
from hfft.recipe.spec import PhaseSpec, Recipe, ReplaySpec
from hfft.replay.cache import ActivationCache, Boundary, Computation, Job, Origin, Place
from hfft.replay.dataset import ActivationDataset, ReplayedData
from hfft.replay.engine import EAGER, Engine, choose_engine
from hfft.replay.recordings import Recording
from hfft.replay.split_point import Prefix, SplitPoint, find_split_point, split_point_at
from hfft.system.distributed import meet, on_main
from hfft.system.files import read_json, write_json
from hfft.system.machine import package_versions
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.plan import duration, prepare_phase

MOST_VIEWS = 2  # of `views: auto`; docs/performance.md has the measurement
_WORTH = 0.2  # share of a training step's multiplications that the frozen part must make
_BATCH = 32  # images per forward pass of an engine that needn't do as training does
_ENGINES = "engines.json"  # their speed on this machine, in the folder of the recordings
_NOTE = "replay.json"  # in the phase's folder: its engine, or null
_SERVING = {"auto": ("onnxruntime", "torch traced", EAGER)}  # whose recordings serve, where several do

_LOG = get_logger(__name__)


def recorded_with(folder: Path) -> str:
    """Name of the engine that a phase's recordings were made with; eager torch where it isn't replayed.

    Args:
        folder: Of the phase.
    """
    return _noted(folder) or EAGER


def is_replayed(folder: Path) -> bool:
    """Whether a phase is fed from recordings.

    Args:
        folder: Of the phase.
    """
    return _noted(folder) is not None


def _noted(folder: Path) -> str | None:
    note = folder / _NOTE
    return read_json(note)["engine"] if note.is_file() else None


def open_replay(
    recipe: Recipe, phases: Sequence[PhaseSpec], processor: Any, fingerprints: Mapping[str, str]
) -> "Replay | None":
    """Replay as a recipe has it; None where it is off.

    Args:
        recipe: Of the run.
        phases: Its phases, as they train.
        processor: The image processor.
        fingerprints: Split name to a hash of its images.
    """
    if recipe.replay.mode == "off":
        return None
    origin = Origin(
        fingerprints=dict(fingerprints),
        processor=f"{type(processor).__name__} {processor.to_dict()} {hash_code([type(processor)])}, decoding {RULE}",
        augment=recipe.data.augment,
        seed=recipe.seed,
        versions={"hfft": __version__, **package_versions()},
    )
    return Replay(recipe.replay, replay_folder(recipe), phases, origin)


def replay_folder(recipe: Recipe) -> Path:
    """Where a run keeps its recordings, and what it has measured of the machine."""
    return Path(recipe.output_dir) / ".replay" if recipe.replay.folder is None else Path(recipe.replay.folder)


@dataclass(frozen=True)
class TrainingActivations:
    """What enters a split point, of each training image once.

    Attributes:
        split_point: Where.
        rows: Recording.
        is_augmented: Whether the images were changed at random.
    """

    split_point: SplitPoint
    rows: Recording
    is_augmented: bool


class _Declined(Exception):
    """Why a phase isn't replayed."""


class Replay:
    """What a run replays: decides for each phase, and records for it and for those that come after."""

    def __init__(self, spec: ReplaySpec, folder: Path, phases: Sequence[PhaseSpec], origin: Origin) -> None:
        """Set up for a run.

        Args:
            spec: The recipe's.
            folder: Where recordings are kept.
            phases: Of the recipe.
            origin: What the images are made from.
        """
        self._spec = spec
        self._cache = ActivationCache(spec, folder, origin)
        self._phases = phases
        self._origin = origin
        self._paths: list[str] = []  # of split points whose recordings are there

    def open(self, model: Any, data: PhaseData, arguments: TrainingArguments, phase: PhaseRun) -> ReplayedData | None:
        """The data of a phase as activations, computed now where they aren't recorded.

        The engine that was chosen is noted in the phase's folder: a phase that is continued goes on in the same way.

        Args:
            model: As `prepare_phase` left it.
            data: Of the phase.
            arguments: Of the phase.
            phase: The phase.

        Returns:
            None where every step computes the whole network; the log says why.
        """
        note, title = phase.folder / _NOTE, phase.title
        engine = read_json(note)["engine"] if note.is_file() else self._spec.engine
        if engine is None:
            return None
        job = Job(model.to(arguments.device), data, arguments, title)
        replayed = None
        try:
            replayed, engine = self._open(job, phase, engine)
        except _Declined as reason:
            engine = None
            _LOG.info(f"{title}: every step computes the whole network: {reason}")
        except OSError as error:
            engine = None
            _LOG.warning(
                f"{title}: every step computes the whole network, as recording its activations failed: {error}"
            )
        meet()  # all have read the note
        if PartialState().is_main_process:
            phase.folder.mkdir(parents=True, exist_ok=True)
            write_json(note, {"engine": engine})
        return replayed

    def recorded(
        self, model: Any, split_point: SplitPoint, data: PhaseData, arguments: TrainingArguments, folder: Path
    ) -> TrainingActivations | None:
        """What is there of a phase's first view of the training images; nothing is computed.

        Args:
            model: With the weights that the phase began with, on the device.
            split_point: Of that model, in front of what the phase trains.
            data: Of the phase.
            arguments: Of the phase.
            folder: Of the phase.

        Returns:
            None where nothing is recorded.
        """
        engine, job, place = _noted(folder), Job(model, data, arguments, "baselines"), Place("train")
        if engine is None:
            return None
        try:
            found = self._cache.find(job, split_point, [place], engine)
        except OSError as error:
            _LOG.info(f"baselines: recordings can't be read: {error}")
            return None
        return (
            None
            if found is None
            else TrainingActivations(split_point, found[place], is_augmented=self._origin.is_random)
        )

    def _open(self, job: Job, phase: PhaseRun, asked: str) -> tuple[ReplayedData, str]:
        if job.data.collate.mixup > 0:
            raise _Declined("mixup mixes the pixels of several images")
        if job.arguments.debug:
            raise _Declined("debug looks at what every module computes, the frozen ones too")
        pixels = job.pixels(1)
        number = phase.number
        split_point = find_split_point(job.model, pixels, self._phases[number].batchnorm)
        if split_point is None:
            raise _Declined("nothing that is frozen comes before all that trains")
        own = Boundary(split_point, self._views(number, job))
        places = [Place("train", view) for view in range(own.views)]
        places += [Place("validation")] if job.data.validation is not None else []
        for engine in _SERVING.get(asked, (asked,)):
            found = self._cache.find(job, split_point, places, engine)
            if found is not None:
                _LOG.info(f"{job.title}: replays what enters {split_point.path}, recorded before")
                self._paths.append(split_point.path)
                return _replayed(job, split_point, found, pixels), engine
        derived = self._derive(job, own, places, asked)
        found, engine = derived or self._record(job, phase, own, places, asked)
        self._paths.append(split_point.path)
        return _replayed(job, split_point, found, pixels), engine

    def _derive(
        self, job: Job, own: Boundary, places: Sequence[Place], asked: str
    ) -> tuple[dict[Place, Recording], str] | None:
        """Compute what a phase needs from the nearest earlier split point that this run has recorded, if any."""
        if hasattr(job.model, "peft_config"):
            return None
        pixels = job.pixels(1)
        split_points = [split_point_at(job.model, path, pixels) for path in self._paths]
        for split_point in sorted(split_points, key=lambda split_point: -split_point.depth):
            for engine in _SERVING.get(asked, (asked,)) if split_point.depth < own.split_point.depth else ():
                found = self._cache.find(job, split_point, places, engine)
                if found is not None:
                    return self._continue(job, split_point, own, found, engine), engine
        return None

    def _continue(
        self, job: Job, start: SplitPoint, own: Boundary, found: Mapping[Place, Recording], engine: str
    ) -> dict[Place, Recording]:
        batch = job.arguments.per_device_train_batch_size
        run = partial(_run, job, Prefix(job.model, [own.split_point], start).eval())
        rows = next(recording.rows([0] * batch) for recording in found.values())
        leaves = {
            own.split_point: [self._cache.leaf(tensor) for tensor in run(*(row.to(job.model.device) for row in rows))]
        }
        needed = sum(map(len, found.values())) * sum(leaf.bytes for leaf in leaves[own.split_point])
        keep = [self._cache.key(job, start, place, engine) for place in found]
        if not self._cache.has_room(needed, keep):
            raise _Declined(f"{_bytes(needed)} of activations don't fit beside those that they are computed from")
        _LOG.info(f"{job.title}: replays what enters {own.split_point.path}, computed from what enters {start.path}")
        computation = Computation(leaves, run, engine, batch)
        for place, source in found.items():
            self._cache.fill(job, place, computation, [own.split_point], source)
        result = self._cache.find(job, own.split_point, list(found), engine)
        if result is None:
            raise OSError("what was recorded can't be read back")
        return result

    def _record(
        self, job: Job, phase: PhaseRun, own: Boundary, places: Sequence[Place], asked: str
    ) -> tuple[dict[Place, Recording], str]:
        """Record what a phase needs, and what later phases need of the same images."""
        batch = job.arguments.per_device_train_batch_size
        sample = job.pixels(batch if self._cache.is_exact else max(batch, _BATCH))
        boundaries = sorted(
            [own, *self._later(job, phase.number, own)], key=lambda boundary: boundary.split_point.depth
        )
        shares, rows = _measure(job, [boundary.split_point for boundary in boundaries], sample[:1])
        share = shares[own.split_point]
        if self._spec.mode == "auto":
            if share < _WORTH:
                raise _Declined(f"what is frozen takes {share:.0%} of a step")
            boundaries = [boundary for boundary in boundaries if shares[boundary.split_point] >= _WORTH]
        sizes = {
            b.split_point: sum(b.wants(place) * len(job.splits[place.split]) for place in places) for b in boundaries
        }
        leaves = {b.split_point: [self._cache.leaf(tensor) for tensor in rows[b.split_point]] for b in boundaries}
        sizes = {
            split_point: count * sum(leaf.bytes for leaf in leaves[split_point])
            for split_point, count in sizes.items()
        }
        names = _SERVING.get(asked, (asked,))
        keep = [
            self._cache.key(job, split_point, place, name)
            for split_point in leaves
            for place in places
            for name in names
        ]
        if not self._cache.has_room(sum(sizes.values()), keep):
            boundaries, leaves = [own], {own.split_point: leaves[own.split_point]}
            if not self._cache.has_room(sizes[own.split_point], keep):
                raise _Declined(
                    f"{_bytes(sizes[own.split_point])} of activations don't fit into replay.budget {self._spec.budget}"
                    " or on the disk"
                )
        prefix = Prefix(job.model, list(leaves)).eval()
        images = sum(len(job.splits[place.split]) for place in places)
        engine = _engine(job, prefix, sample, asked=asked, images=images, memory=self._cache.folder / _ENGINES)
        speed = "" if engine.images_per_second is None else f", about {images / engine.images_per_second:.0f} s"
        _LOG.info(
            f"{job.title}: replays what enters {own.split_point.path}, as what is frozen takes {share:.0%} of a step; "
            f"up to {_bytes(sum(sizes[point] for point in leaves))}{speed} with {engine.name}"
        )
        computation = Computation(leaves, engine.run, engine.name, len(sample))
        begun = time.monotonic()
        recorded = 0
        for place in places:
            wanted = [boundary.split_point for boundary in boundaries if boundary.wants(place)]
            recorded += self._cache.fill(job, place, computation, wanted)
        seconds = time.monotonic() - begun
        _LOG.info(f"{job.title}: {recorded:,} images recorded in {seconds:.1f} s, {recorded / seconds:.0f} images/s")
        found = self._cache.find(job, own.split_point, places, engine.name)
        if found is None:
            raise OSError("what was recorded can't be read back")
        return found, engine.name

    def _later(self, job: Job, number: int, own: Boundary) -> list[Boundary]:
        """What later phases need of the network as it is now: in front of all that the phases before them train."""
        boundaries: list[Boundary] = []
        deepest, pixels = own.split_point.depth, job.pixels(1)
        if hasattr(job.model, "peft_config"):
            return boundaries
        for later in range(number + 1, len(self._phases)):
            spec = self._phases[later]
            network = prepare_phase(copy.deepcopy(job.model), spec, pixels)
            found = find_split_point(network, pixels, spec.batchnorm)
            if found is None:
                break
            split_point = split_point_at(job.model, found.path, pixels)
            if split_point.depth <= deepest and split_point.path not in [
                boundary.split_point.path for boundary in [own, *boundaries]
            ]:
                boundaries.append(Boundary(split_point, self._views(later, job)))
            deepest = min(deepest, split_point.depth)
        return boundaries

    def _views(self, number: int, job: Job) -> int:
        """Views of a phase: as many as were asked for, but no more than it has epochs."""
        if not self._origin.is_random:
            return 1
        _, epochs = duration(self._phases[number], len(job.data.train), PartialState().num_processes)
        return min(math.ceil(epochs), MOST_VIEWS if self._spec.views == "auto" else self._spec.views)


def _replayed(
    job: Job, split_point: SplitPoint, found: Mapping[Place, Recording], pixels: torch.Tensor
) -> ReplayedData:
    views = [recording for place, recording in found.items() if place.split == "train"]
    train = ActivationDataset(views, job.data.train.labels)
    validation = None
    if job.data.validation is not None:
        validation = ActivationDataset([found[Place("validation")]], job.data.validation.labels)
    return ReplayedData(split_point, train, validation, pixels.shape[1:])


def _measure(
    job: Job, split_points: Sequence[SplitPoint], pixels: torch.Tensor
) -> tuple[dict[SplitPoint, float], dict[SplitPoint, tuple[torch.Tensor, ...]]]:
    """For each split point, the share of a training step that is spent in front of it, and what enters it.

    Counted in multiplications and not in seconds, so that every run of a recipe decides alike. A backward pass is
    taken for twice the forward pass of what trains; what is frozen has none.
    """
    rows: dict[SplitPoint, tuple[torch.Tensor, ...]] = {}
    before: dict[SplitPoint, int] = {}
    model = job.model.eval()
    with torch.no_grad(), job.precision(), FlopCounterMode(display=False) as counter, ExitStack() as undo:

        def note(split_point: SplitPoint, tensors: tuple[torch.Tensor, ...]) -> None:
            rows[split_point], before[split_point] = tensors, counter.get_total_flops()

        for split_point in split_points:
            undo.enter_context(split_point.reached(partial(note, split_point)))
        model(pixel_values=pixels)
        whole = counter.get_total_flops()
    return {
        split_point: before[split_point] / max(before[split_point] + 3 * (whole - before[split_point]), 1)
        for split_point in split_points
    }, rows


def _engine(job: Job, prefix: Prefix, sample: torch.Tensor, *, asked: str, images: int, memory: Path) -> Engine:
    """The engine of the pass, the same in every process."""
    if job.autocast is torch.float16:
        return Engine(EAGER, partial(_run, job, prefix), None, 0.0)
    config = job.model.config
    options = {
        "bfloat16": job.autocast is torch.bfloat16,
        "images": images,
        "memory": memory if PartialState().is_main_process else None,
        "key": f"{config.model_type} {config.name_or_path} ({prefix.architecture}) to {prefix.end}",
    }
    if asked == "auto":
        engine = choose_engine(prefix, sample, asked=asked, **options) if PartialState().is_main_process else None
        asked = on_main(lambda: "" if engine is None else engine.name)
        if engine is not None:
            return engine
    return choose_engine(prefix, sample, asked=asked, **options)


def _run(job: Job, prefix: Prefix, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), job.precision():
        return prefix(*inputs)


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
