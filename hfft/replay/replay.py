"""Replay: what enters the part that a phase trains is computed once, for this phase, later ones and later runs."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch.utils.flop_counter import FlopCounterMode

from hfft._version import __version__
from hfft.data.images.decoding import RULE
from hfft.model.fingerprint import hash_code
from hfft.recipe.spec import PhaseSpec, Recipe, ReplaySpec
from hfft.replay.cache import ActivationCache, Origin, Program, View
from hfft.replay.dataset import ActivationDataset, ReplayedData
from hfft.replay.engine import EAGER, ONNXRUNTIME, Engine, choose_engine, eager
from hfft.replay.extraction import FrozenPass
from hfft.replay.split_point import Prefix, SplitPoint, find_split_point, split_point_at
from hfft.replay.store import Recording
from hfft.runs.record import PhaseRecord
from hfft.system.distributed import meet, on_main
from hfft.system.machine import package_versions

MOST_VIEWS = 2  # of `views: auto`; docs/performance.md has the measurement
_WORTH = 0.2  # share of a training step's multiplications that the frozen part must make
_BATCH = 32  # images per forward pass of an engine that needn't do as training does
_ENGINES = "engines.json"  # their speed on this machine, in the folder of the recordings

_LOG = get_logger(__name__)


def replay_folder(recipe: Recipe) -> Path:
    """Where a run keeps its recordings, and what it has measured of the machine."""
    return Path(recipe.output_dir) / ".replay" if recipe.replay.folder is None else Path(recipe.replay.folder)


def image_origin(recipe: Recipe, processor: Any, fingerprints: Mapping[str, str]) -> Origin:
    """What a run's activations are made from, besides the network."""
    return Origin(
        fingerprints=dict(fingerprints),
        processor=f"{type(processor).__name__} {processor.to_dict()} {hash_code([type(processor)])}, decoding {RULE}",
        augment=recipe.data.augment,
        seed=recipe.seed,
        versions={"hfft": __version__, **package_versions()},
    )


@dataclass(frozen=True)
class TrainingActivations:
    """What enters a split point, of each training image once.

    Attributes:
        rows: One per image.
        is_augmented: Whether the images were changed at random.
    """

    split_point: SplitPoint
    rows: Recording
    is_augmented: bool


@dataclass(frozen=True)
class RunPhases:
    """The phases of a run, as far as replay looks ahead.

    Attributes:
        specs: In order.
        prepare: A network, a phase and an image -> the network as the phase trains it.
        duration: A phase, a number of training images and one of processes -> optimizer steps and epochs.
    """

    specs: Sequence[PhaseSpec]
    prepare: Callable[[Any, PhaseSpec, torch.Tensor], Any]
    duration: Callable[[PhaseSpec, int, int], tuple[int, float]]

    def split_later(self, frozen: FrozenPass, number: int, own: SplitPoint) -> dict[int, SplitPoint]:
        """Where later phases are split, by number, as far as that is in front of all that phases before them train."""
        network, pixels, deepest = frozen.network, frozen.pixels(1), own.depth
        found: dict[int, SplitPoint] = {}
        if hasattr(network, "peft_config"):
            return found
        for later in range(number + 1, len(self.specs)):
            phase = self.specs[later]
            prepared = self.prepare(copy.deepcopy(network), phase, pixels)
            split_point = find_split_point(prepared, pixels, phase.batchnorm)
            if split_point is None:
                break
            split_point = split_point_at(network, split_point.path, pixels)
            if split_point.depth <= deepest and split_point.path not in [one.path for one in (own, *found.values())]:
                found[later] = split_point
            deepest = min(deepest, split_point.depth)
        return found


@dataclass(frozen=True)
class _Found:
    """Recordings of a phase, and the engine that made them."""

    recordings: Mapping[View, Recording]
    engine: str

    def as_data(self, frozen: FrozenPass, split_point: SplitPoint) -> ReplayedData:
        train = [recording for view, recording in self.recordings.items() if view.split == "train"]
        validation = self.recordings.get(View("validation"))
        return ReplayedData(
            split_point,
            ActivationDataset(train, frozen.splits["train"].labels),
            None if validation is None else ActivationDataset([validation], frozen.splits["validation"].labels),
        )


class _Declined(Exception):
    """Why a phase isn't replayed."""


class Replay:
    """What a run replays: decides for each phase, and records for it and for those that come after."""

    def __init__(self, spec: ReplaySpec, folder: Path, origin: Origin, phases: RunPhases) -> None:
        """Set up for a run that keeps its recordings in a folder."""
        self._spec = spec
        self._cache = ActivationCache(spec, folder, origin)
        self._origin = origin
        self._phases = phases
        self._paths: list[str] = []  # of split points whose recordings are there
        self._engines = (ONNXRUNTIME, EAGER) if spec.engine == "auto" else (spec.engine,)

    def open(self, frozen: FrozenPass, number: int, folder: Path) -> ReplayedData | None:
        """The data of a phase as activations, computed now where they aren't recorded.

        The engine that was chosen is noted in the phase's folder: a phase that is continued goes on in the same way.

        Args:
            frozen: The phase's network and images.
            number: Of the phase, from 0.
            folder: The phase's.

        Returns:
            None where every step computes the whole network; the log says why.
        """
        record = PhaseRecord(folder)
        noted = record.engine(default="undecided")
        if noted is None:
            return None
        replayed, engine = None, None
        whole = f"{frozen.title}: every step computes the whole network"
        try:
            replayed, engine = self._open(frozen, number, noted if noted in (ONNXRUNTIME, EAGER) else None)
        except _Declined as reason:
            _LOG.info(f"{whole}: {reason}")
        except OSError as error:
            _LOG.warning(f"{whole}, as recording its activations failed: {error}")
        meet()  # all have read the note
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_engine(engine)
        return replayed

    def recorded(self, frozen: FrozenPass, split_point: SplitPoint, folder: Path) -> TrainingActivations | None:
        """What a phase has recorded of its first view of the training images, if anything; nothing is computed.

        Args:
            frozen: The network with the weights that the phase began with, and the images.
            split_point: Of that network, in front of what the phase trains.
            folder: The phase's.
        """
        engine, view = PhaseRecord(folder).engine(), View("train")
        if engine is None:
            return None
        try:
            found = self._cache.find(frozen, split_point, [view], engine)
        except OSError as error:
            _LOG.info(f"{frozen.title}: recordings can't be read: {error}")
            return None
        return None if found is None else TrainingActivations(split_point, found[view], self._origin.is_random)

    def _open(self, frozen: FrozenPass, number: int, noted: str | None) -> tuple[ReplayedData, str]:
        phase = self._phases.specs[number]
        if mixing := self._origin.augment.mixing:
            raise _Declined(f"pixels of several images are mixed ({', '.join(mixing)})")
        if phase.arguments.get("debug"):
            raise _Declined("debug looks at what every module computes, the frozen ones too")
        split_point = find_split_point(frozen.network, frozen.pixels(1), phase.batchnorm)
        if split_point is None:
            raise _Declined("nothing that is frozen comes before all that trains")
        engines = self._engines if noted is None else [noted]
        views = [View("train", view) for view in range(self._views(number, frozen))]
        views += [View("validation")] if "validation" in frozen.splits else []
        found = self._find(frozen, split_point, views, engines)
        if found is not None:
            _LOG.info(f"{frozen.title}: replays what enters {split_point.path}, recorded before")
        else:
            found = self._continue(frozen, split_point, views, engines)
        if found is None:
            found = self._record(frozen, number, split_point, views, engines)
        self._paths.append(split_point.path)
        return found.as_data(frozen, split_point), found.engine

    def _find(
        self, frozen: FrozenPass, split_point: SplitPoint, views: Sequence[View], engines: Sequence[str]
    ) -> _Found | None:
        for engine in engines:
            recordings = self._cache.find(frozen, split_point, views, engine)
            if recordings is not None:
                return _Found(recordings, engine)
        return None

    def _continue(
        self, frozen: FrozenPass, split_point: SplitPoint, views: Sequence[View], engines: Sequence[str]
    ) -> _Found | None:
        """Compute what a phase needs from the nearest earlier split point that this run has recorded, if any."""
        network = frozen.network
        if hasattr(network, "peft_config"):
            return None
        pixels = frozen.pixels(1)
        earlier = [split_point_at(network, path, pixels) for path in self._paths]
        for start in sorted(earlier, key=lambda point: -point.depth):
            known = self._find(frozen, start, views, engines) if start.depth < split_point.depth else None
            if known is None:
                continue
            sources, engine = known.recordings, known.engine
            run = eager(Prefix(network, [split_point], start).eval(), frozen.autocast)
            rows = next(iter(sources.values())).rows([0] * frozen.batch_size)
            leaves = [self._cache.leaf(tensor) for tensor in run(*(row.to(frozen.device) for row in rows))]
            needed = sum(map(len, sources.values())) * sum(leaf.bytes for leaf in leaves)
            if not self._cache.has_room(needed, frozen, [start], views, [engine]):
                raise _Declined(f"{_bytes(needed)} of activations don't fit next to those that they are computed from")
            _LOG.info(
                f"{frozen.title}: replays what enters {split_point.path}, computed from what enters {start.path}"
            )
            program = Program({split_point: leaves}, run, engine, frozen.batch_size)
            for view, source in sources.items():
                self._cache.fill(frozen, view, program, [split_point], source)
            return self._read_back(frozen, split_point, views, engine)
        return None

    def _record(
        self, frozen: FrozenPass, number: int, own: SplitPoint, views: Sequence[View], engines: Sequence[str]
    ) -> _Found:
        """Record what a phase needs, and what later phases need of the same images."""
        sample = frozen.pixels(frozen.batch_size if self._cache.is_exact else max(frozen.batch_size, _BATCH))
        needs = {own: self._views(number, frozen)}
        for later, split_point in self._phases.split_later(frozen, number, own).items():
            needs[split_point] = self._views(later, frozen)
        shares, entering = _measure(frozen, sorted(needs, key=lambda point: point.depth), sample[:1])
        leaves = {point: [self._cache.leaf(tensor) for tensor in tensors] for point, tensors in entering.items()}
        if self._spec.mode == "auto":
            if shares[own] < _WORTH:
                raise _Declined(f"what is frozen takes {shares[own]:.0%} of a step")
            leaves = {point: kept for point, kept in leaves.items() if shares[point] >= _WORTH}

        def wanted(view: View) -> list[SplitPoint]:
            return [point for point in leaves if view.split != "train" or view.number < needs[point]]

        sizes = dict.fromkeys(leaves, 0)
        for view in views:
            for point in wanted(view):
                sizes[point] += len(frozen.splits[view.split]) * sum(leaf.bytes for leaf in leaves[point])
        if not self._cache.has_room(sum(sizes.values()), frozen, list(leaves), views, engines):
            leaves, sizes = {own: leaves[own]}, {own: sizes[own]}
            if not self._cache.has_room(sizes[own], frozen, [own], views, engines):
                budget = f"replay.budget {self._spec.budget}"
                raise _Declined(f"{_bytes(sizes[own])} of activations don't fit into {budget} or on the disk")
        images = sum(len(frozen.splits[view.split]) for view in views)
        engine = _choose_engine(
            frozen, list(leaves), sample, engines=engines, images=images, memory=self._cache.folder / _ENGINES
        )
        speed = "" if engine.images_per_second is None else f", about {images / engine.images_per_second:.0f} s"
        _LOG.info(
            f"{frozen.title}: replays what enters {own.path}, as what is frozen takes {shares[own]:.0%} of a step; "
            f"up to {_bytes(sum(sizes.values()))}{speed} with {engine.name}"
        )
        program = Program(leaves, engine.run, engine.name, len(sample))
        begun = time.monotonic()
        computed = sum(self._cache.fill(frozen, view, program, wanted(view)) for view in views)
        seconds = time.monotonic() - begun
        _LOG.info(
            f"{frozen.title}: {computed:,} images recorded in {seconds:.1f} s, {computed / seconds:.0f} images/s"
        )
        return self._read_back(frozen, own, views, engine.name)

    def _read_back(self, frozen: FrozenPass, split_point: SplitPoint, views: Sequence[View], engine: str) -> _Found:
        found = self._find(frozen, split_point, views, [engine])
        if found is None:
            raise OSError("what was recorded can't be read back")
        return found

    def _views(self, number: int, frozen: FrozenPass) -> int:
        """Views of a phase: as many as were asked for, but no more than it has epochs."""
        if not self._origin.is_random:
            return 1
        images, processes = len(frozen.splits["train"]), PartialState().num_processes
        _, epochs = self._phases.duration(self._phases.specs[number], images, processes)
        return min(math.ceil(epochs), MOST_VIEWS if self._spec.views == "auto" else self._spec.views)


def _measure(
    frozen: FrozenPass, split_points: Sequence[SplitPoint], pixels: torch.Tensor
) -> tuple[dict[SplitPoint, float], dict[SplitPoint, tuple[torch.Tensor, ...]]]:
    """For each split point, the share of a training step that is spent in front of it, and what enters it.

    Counted in multiplications and not in seconds, so that every run of a recipe decides alike. A backward pass is
    taken for twice the forward pass of what trains; what is frozen has none.
    """
    entering: dict[SplitPoint, tuple[torch.Tensor, ...]] = {}
    before: dict[SplitPoint, int] = {}
    network = frozen.network.eval()
    autocast = torch.autocast(frozen.device.type, frozen.autocast, enabled=frozen.autocast is not None)
    with torch.no_grad(), autocast, FlopCounterMode(display=False) as counter, ExitStack() as undo:

        def note(point: SplitPoint, tensors: tuple[torch.Tensor, ...]) -> None:
            entering[point], before[point] = tensors, counter.get_total_flops()

        for point in split_points:
            undo.enter_context(point.reached(partial(note, point)))
        network(pixel_values=pixels)
        whole = counter.get_total_flops()
    shares = {point: count / max(count + 3 * (whole - count), 1) for point, count in before.items()}
    return shares, entering


def _choose_engine(
    frozen: FrozenPass,
    split_points: Sequence[SplitPoint],
    sample: torch.Tensor,
    *,
    engines: Sequence[str],
    images: int,
    memory: Path,
) -> Engine:
    """The engine of a pass to some split points, the same in every process."""
    prefix, config = Prefix(frozen.network, split_points).eval(), frozen.network.config
    key = f"{config.model_type} {config.name_or_path} ({split_points[-1].architecture}) to {split_points[-1].path}"
    choose = partial(choose_engine, prefix, sample, autocast=frozen.autocast, images=images)
    if len(engines) == 1:
        return choose(asked=engines[0])
    engine = choose(asked="auto", memory=memory, key=key) if PartialState().is_main_process else None
    name = on_main(lambda: "" if engine is None else engine.name)
    return engine or choose(asked=name)


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
