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
from hfft.replay.cache import ActivationCache, FrozenPass, Origin, Program, View
from hfft.replay.dataset import ActivationDataset, ReplayedData
from hfft.replay.engine import EAGER, ONNXRUNTIME, Engine, choose_engine, eager
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
    """What a run's activations are made from, apart from the network."""
    return Origin(
        fingerprints=dict(fingerprints),
        processor=f"{type(processor).__name__} {processor.to_dict()} {hash_code([type(processor)])}, decoding {RULE}",
        augment=recipe.data.augment,
        seed=recipe.seed,
        versions={"hfft": __version__, **package_versions()},
    )


@dataclass(frozen=True)
class TrainingActivations:
    """What enters a split point, one row for each training image, which may have been augmented at random."""

    split_point: SplitPoint
    rows: Recording
    is_augmented: bool


@dataclass(frozen=True)
class RunPhases:
    """The phases of a run, as far as replay looks ahead."""

    specs: Sequence[PhaseSpec]
    prepare: Callable[[Any, PhaseSpec, torch.Tensor], Any]  # network, phase, image -> network as the phase trains it
    duration: Callable[[PhaseSpec, int, int], tuple[int, float]]  # phase, images, processes -> steps, epochs

    def split_points(self, frozen: FrozenPass, number: int, own: SplitPoint) -> dict[SplitPoint, int]:
        """A phase's split point and those of later phases, as far as nothing in front of them is trained until then.

        Returns:
            Split point to number of the phase.
        """
        network, pixels, deepest = frozen.network, frozen.pixels(1), own.depth
        found = {own: number}
        if hasattr(network, "peft_config"):
            return found
        for later in range(number + 1, len(self.specs)):
            phase = self.specs[later]
            prepared = self.prepare(copy.deepcopy(network), phase, pixels)
            split_point = find_split_point(prepared, pixels, phase.batchnorm)
            if split_point is None:
                break
            split_point = split_point_at(network, split_point.path, pixels)
            if split_point.depth <= deepest and split_point.path not in [one.path for one in found]:
                found[split_point] = later
            deepest = min(deepest, split_point.depth)
        return found


class _Declined(Exception):
    """Why a phase isn't replayed."""


@dataclass(frozen=True)
class _Request:
    """Some views of a phase's images at its split point, recorded by the first of some engines that can."""

    frozen: FrozenPass
    split_point: SplitPoint
    views: Sequence[View]
    engines: Sequence[str]


_Found = tuple[Mapping[View, Recording], str]
"""The recordings, and the engine that made them."""


class Replay:
    """What a run replays: decides for each phase, and records for it and for those that come after."""

    def __init__(self, spec: ReplaySpec, folder: Path, origin: Origin, phases: RunPhases) -> None:
        """Set up for a run that keeps its recordings in a folder."""
        self._cache = ActivationCache(spec, folder, origin)
        self._phases = phases
        self._paths: list[str] = []  # of split points whose recordings are there

    def open(self, frozen: FrozenPass, number: int, folder: Path) -> ReplayedData | None:
        """The data of a phase as activations, computed now where they aren't recorded.

        The engine that was chosen is noted in the phase's folder: a phase that is continued goes on in the same way.

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
            replayed, engine = self._open(frozen, number, noted)
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

        The network has the weights that the phase began with, and the split point in front of what the phase trains.
        """
        engine, view = PhaseRecord(folder).engine(), View("train")
        if engine is None:
            return None
        try:
            found = self._cache.find(frozen, split_point, [view], [engine])
        except OSError as error:
            _LOG.info(f"{frozen.title}: recordings can't be read: {error}")
            return None
        is_augmented = self._cache.origin.is_random
        return None if found is None else TrainingActivations(split_point, found[0][view], is_augmented)

    def _open(self, frozen: FrozenPass, number: int, noted: str) -> tuple[ReplayedData, str]:
        phase, asked = self._phases.specs[number], self._cache.spec.engine
        if mixing := self._cache.origin.augment.mixing:
            raise _Declined(f"pixels of several images are mixed ({', '.join(mixing)})")
        if phase.arguments.get("debug"):
            raise _Declined("debug looks at what every module computes, the frozen ones too")
        split_point = find_split_point(frozen.network, frozen.pixels(1), phase.batchnorm)
        if split_point is None:
            raise _Declined("nothing that is frozen comes before all that trains")
        engines = (ONNXRUNTIME, EAGER) if asked == "auto" else (asked,)
        views = [View("train", view) for view in range(self._views(number, frozen))]
        views += [View("validation")] if "validation" in frozen.splits else []
        request = _Request(frozen, split_point, views, (noted,) if noted in (ONNXRUNTIME, EAGER) else engines)
        found = self._cache.find(frozen, split_point, views, request.engines)
        if found is not None:
            _LOG.info(f"{frozen.title}: replays what enters {split_point.path}, recorded before")
        else:
            found = _continue(self._cache, request, self._paths)
        if found is None:
            needs = self._phases.split_points(frozen, number, split_point)
            found = _record(self._cache, request, {point: self._views(one, frozen) for point, one in needs.items()})
        self._paths.append(split_point.path)
        recordings, engine = found
        train = [recording for view, recording in recordings.items() if view.split == "train"]
        validation = recordings.get(View("validation"))
        replayed = ReplayedData(
            split_point,
            ActivationDataset(train, frozen.splits["train"].labels),
            None if validation is None else ActivationDataset([validation], frozen.splits["validation"].labels),
        )
        return replayed, engine

    def _views(self, number: int, frozen: FrozenPass) -> int:
        """Views of a phase: as many as were asked for, but no more than it has epochs."""
        if not self._cache.origin.is_random:
            return 1
        images, processes = len(frozen.splits["train"]), PartialState().num_processes
        _, epochs = self._phases.duration(self._phases.specs[number], images, processes)
        asked = self._cache.spec.views
        return min(math.ceil(epochs), MOST_VIEWS if asked == "auto" else asked)


def _continue(cache: ActivationCache, request: _Request, paths: Sequence[str]) -> _Found | None:
    """Compute what a phase needs from the nearest earlier split point that this run has recorded, if any."""
    frozen, split_point, views = request.frozen, request.split_point, request.views
    network = frozen.network
    if hasattr(network, "peft_config"):
        return None
    pixels = frozen.pixels(1)
    earlier = [split_point_at(network, path, pixels) for path in paths]
    for start in sorted(earlier, key=lambda point: -point.depth):
        known = cache.find(frozen, start, views, request.engines) if start.depth < split_point.depth else None
        if known is None:
            continue
        sources, engine = known
        run = eager(Prefix(network, [split_point], start).eval(), frozen.autocast)
        rows = next(iter(sources.values())).rows([0] * frozen.batch_size)
        leaves = [cache.leaf(tensor) for tensor in run(*(row.to(frozen.device) for row in rows))]
        needed = sum(map(len, sources.values())) * sum(leaf.bytes for leaf in leaves)
        if not cache.has_room(needed, frozen, [start], views, [engine]):
            raise _Declined(f"{_bytes(needed)} of activations don't fit next to those that they are computed from")
        _LOG.info(f"{frozen.title}: replays what enters {split_point.path}, computed from what enters {start.path}")
        program = Program({split_point: leaves}, run, engine, frozen.batch_size)
        for view, source in sources.items():
            cache.fill(frozen, view, program, [split_point], source)
        return _read_back(cache, request, engine)
    return None


def _record(cache: ActivationCache, request: _Request, needs: Mapping[SplitPoint, int]) -> _Found:
    """Record what a phase needs, and what later phases need of the same images: so many views at each split point."""
    frozen, own, views = request.frozen, request.split_point, request.views
    sample = frozen.pixels(frozen.batch_size if cache.is_exact else max(frozen.batch_size, _BATCH))
    shares, entering = _measure(frozen, sorted(needs, key=lambda point: point.depth), sample[:1])
    leaves = {point: [cache.leaf(tensor) for tensor in tensors] for point, tensors in entering.items()}
    if cache.spec.mode == "auto":
        if shares[own] < _WORTH:
            raise _Declined(f"what is frozen takes {shares[own]:.0%} of a step")
        leaves = {point: kept for point, kept in leaves.items() if shares[point] >= _WORTH}
    for points in (list(leaves), [own]):  # with what later phases need, or without
        wanted = {view: [one for one in points if view.split != "train" or view.number < needs[one]] for view in views}
        needed = 0
        for view, some in wanted.items():
            needed += len(frozen.splits[view.split]) * sum(leaf.bytes for point in some for leaf in leaves[point])
        if cache.has_room(needed, frozen, points, views, request.engines):
            break
    else:
        budget = f"replay.budget {cache.spec.budget}"
        raise _Declined(f"{_bytes(needed)} of activations don't fit into {budget} or on the disk")
    images = sum(len(frozen.splits[view.split]) for view in views)
    engine = _choose_engine(request, points, sample, images=images, memory=cache.folder / _ENGINES)
    speed = "" if engine.images_per_second is None else f", about {images / engine.images_per_second:.0f} s"
    _LOG.info(
        f"{frozen.title}: replays what enters {own.path}, as what is frozen takes {shares[own]:.0%} of a step; "
        f"up to {_bytes(needed)}{speed} with {engine.name}"
    )
    program = Program({point: leaves[point] for point in points}, engine.run, engine.name, len(sample))
    begun = time.monotonic()
    computed = sum(cache.fill(frozen, view, program, some) for view, some in wanted.items())
    seconds = time.monotonic() - begun
    _LOG.info(f"{frozen.title}: {computed:,} images recorded in {seconds:.1f} s, {computed / seconds:.0f} images/s")
    return _read_back(cache, request, engine.name)


def _read_back(cache: ActivationCache, request: _Request, engine: str) -> _Found:
    found = cache.find(request.frozen, request.split_point, request.views, [engine])
    if found is None:
        raise OSError("what was recorded can't be read back")
    return found


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
    request: _Request, split_points: Sequence[SplitPoint], sample: torch.Tensor, *, images: int, memory: Path
) -> Engine:
    """The engine of a pass to some split points, the same in every process."""
    network, last = request.frozen.network, split_points[-1]
    key = f"{network.config.model_type} {network.config.name_or_path} ({last.architecture}) to {last.path}"
    prefix = Prefix(network, split_points).eval()
    choose = partial(choose_engine, prefix, sample, autocast=request.frozen.autocast, images=images)
    if len(request.engines) == 1:
        return choose(asked=request.engines[0])
    engine = choose(asked="auto", memory=memory, key=key) if PartialState().is_main_process else None
    name = on_main(lambda: "" if engine is None else engine.name)
    return engine or choose(asked=name)


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
