"""Which software runs the frozen pass fastest on this machine: measured once, checked against torch, remembered.

The frozen part of a network runs once over all images before a phase trains the rest. Convolutions with BatchNorm
behind them, above all, run several times faster once the statistics are folded into the weights.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from hfft.errors import ModelError
from hfft.replay.programs import BUILDERS, Job, Refused, Run, eager, layout_of
from hfft.system.files import recall, remember
from hfft.system.machine import hardware

_LOG = get_logger(__name__)

_Rates = Mapping[str, Mapping[str, float]]  # by engine: images_per_second, and setup in seconds

EAGER = "torch"
"""Name of the engine that is torch as it trains."""
_ROUNDS = 3  # timed batches of each candidate; the fastest counts, as other work on the machine only slows down
_GLANCE = 4  # images that tell about how long the pass will take
_BEHIND = 1.5  # times the fastest candidate's seconds: one that is slower is timed no further
_SHORT_BATCHES, _SHORT_SECONDS = 20, 8.0  # a measurement takes about a third of this: a shorter pass can't repay it
_ROUNDING = 1e-4  # of an output's largest value; other orders of float32 sums were seen to differ by up to 1e-5
_SPREAD = 3.0  # times bfloat16's own distance from float32; two bfloat16 programs differ by about one such distance


@dataclass(frozen=True)
class Engine:
    """A way to run the frozen pass.

    Attributes:
        name: "torch" (eager), "torch traced" (frozen TorchScript, BatchNorm folded) or "onnxruntime".
        run: Pixels (B, C, H, W) float32 -> the prefix's outputs, without gradient. B, C, H and W are those that the
            engine was chosen with.
        images_per_second: As measured; None where nothing was measured.
        difference: Largest difference of an output from eager torch in the same precision, on the images of the
            choice, as a fraction of that output's largest value in float32.
    """

    name: str
    run: Run
    images_per_second: float | None
    difference: float


@dataclass(frozen=True)
class _Candidate:
    """An engine that passed the check.

    Attributes:
        run: The engine.
        difference: As of the engine.
        setup: Seconds until it ran at full speed.
        batch: Seconds of one batch.
    """

    run: Run
    difference: float
    setup: float
    batch: float


def choose_engine(
    prefix: nn.Module, pixels: Tensor, *, asked: str, bfloat16: bool, images: int, memory: Path | None, key: str
) -> Engine:
    """The engine that finishes the frozen pass first, its preparation included.

    Every candidate must agree with eager torch on the given images, each time: in float32 up to rounding; in bfloat16
    it may be no further from float32 than a few times what eager bfloat16 is. On an accelerator the candidates are
    eager and traced torch, as onnxruntime would run on the CPU.

    Args:
        prefix: In evaluation mode and frozen; pixels -> flat tuple of tensors with B rows each.
        pixels: Real images (B, C, H, W) float32, a full batch, on the prefix's device.
        asked: "torch": eager, the only one whose float32 outputs are bit-equal to the plain run's; nothing is
            measured. "onnxruntime" or "torch traced": that or an error. "auto": the fastest of all.
        bfloat16: Whether torch runs under bfloat16 autocast.
        images: How many the pass will run over. Where eager torch needs some seconds only, nothing is measured.
        memory: JSON file of earlier measurements; None to forget.
        key: What the prefix is, for `memory`: equal for equal architecture and split point. Machine, versions,
            precision and the shape of the batch are added here.

    Raises:
        ModelError: If the one that was asked for is missing, can't run this prefix, or computes something else.
    """
    plain = Engine(EAGER, eager(prefix, bfloat16), None, 0.0)
    if asked == EAGER:
        return plain
    place = f"{key}, {_circumstances(Job(prefix, pixels, bfloat16, (), ()))}"
    known = _recall(memory, place) if asked not in BUILDERS else None
    if asked not in BUILDERS and not known and _is_short(plain.run, pixels, images):
        _LOG.info("frozen pass: torch; %d images are too few to look for something faster", images)
        return plain
    outputs, seconds = _timed(plain.run, pixels)
    exact = eager(prefix, False)(pixels) if bfloat16 else outputs
    job = Job(prefix, pixels, bfloat16, outputs, exact)
    if asked in BUILDERS:
        return _insist(asked, job)
    if known and (engine := _reuse(known, plain, job, images)):
        return engine
    candidates, refused = _prepare(job)
    candidates = {EAGER: _Candidate(plain.run, 0.0, 0.0, seconds), **candidates}
    known = _measure(candidates, pixels)
    name = _first_to_finish(known, images)
    _LOG.info("frozen pass: %s; images/s: %s", name, _describe(known, refused))
    _remember(memory, place, known)
    return Engine(name, candidates[name].run, known[name]["images_per_second"], candidates[name].difference)


def _prepare(job: Job) -> tuple[dict[str, _Candidate], dict[str, str]]:
    """The candidates that agree with eager torch, and for the others the reason, by name."""
    candidates, refused = {}, {}
    for name in BUILDERS:
        try:
            candidates[name] = _build(name, job)
        except Refused as reason:
            refused[name] = str(reason)
    return candidates, refused


def _build(name: str, job: Job) -> _Candidate:
    """Build a candidate and check it; Refused if it can't be built or run, or computes something else."""
    start = time.perf_counter()
    try:
        bare = BUILDERS[name](job)
        dtypes = [output.dtype for output in job.outputs]

        def run(pixels: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs = bare(pixels)
            return tuple(output.to(dtype) for output, dtype in zip(outputs, dtypes, strict=True))

        run(job.pixels)
        outputs, seconds = _timed(run, job.pixels)  # TorchScript optimizes itself in its second run
    except Refused:
        raise
    except Exception as error:  # compilers and exporters raise whatever they stumble over
        raise Refused(_reason(error)) from error
    setup = time.perf_counter() - start
    return _Candidate(run, _check(outputs, job), setup, seconds)


def _check(outputs: tuple[Tensor, ...], job: Job) -> float:
    """The largest relative difference from eager torch in the run's precision; Refused if it is too large."""
    largest = 0.0
    for number, (output, plain, exact) in enumerate(zip(outputs, job.outputs, job.exact, strict=True)):
        if output.shape != plain.shape:
            raise Refused(f"output {number} is {tuple(output.shape)}, in torch {tuple(plain.shape)}")
        size, distance = _distance(exact, torch.zeros_like(exact)), _distance(output, exact)
        limit = max(_SPREAD * _distance(plain, exact), _ROUNDING * size)
        if not distance <= limit:  # so that NaN is refused too
            raise Refused(f"output {number} differs from torch by up to {distance:.2g}; {limit:.2g} is allowed")
        largest = max(largest, _distance(output, plain) / (size or 1.0))
    return largest


def _distance(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return float((left.float() - right.float()).abs().max())


def _insist(name: str, job: Job) -> Engine:
    """An engine by name, not timed; ModelError if it is refused."""
    try:
        candidate = _build(name, job)
    except Refused as reason:
        raise ModelError(f"replay.engine: {name} can't be used: {reason}; auto takes one that can") from reason
    return Engine(name, candidate.run, None, candidate.difference)


def _measure(candidates: Mapping[str, _Candidate], pixels: Tensor) -> _Rates:
    """Rate and preparation time by name: batches in turn, so that a busy moment of the machine hits all alike."""
    best = {name: candidate.batch for name, candidate in candidates.items()}
    for _ in range(_ROUNDS - 1):
        slow = _BEHIND * min(best.values())
        for name, candidate in candidates.items():
            if best[name] <= slow:
                best[name] = min(best[name], _timed(candidate.run, pixels)[1])
    return {
        name: {"images_per_second": len(pixels) / best[name], "setup": candidate.setup}
        for name, candidate in candidates.items()
    }


def _is_short(run: Run, pixels: Tensor, images: int) -> bool:
    glance = pixels[:_GLANCE]
    if pixels.device.type != "cpu":
        run(glance)  # the first one loads kernels, which takes seconds
    image = _timed(run, glance)[1] / len(glance)
    return image * images < _SHORT_BATCHES * image * len(pixels) + _SHORT_SECONDS


def _timed(run: Run, pixels: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """What comes out, and the seconds it took."""
    is_ahead = pixels.device.type != "cpu"  # an accelerator works on while the program goes on
    if is_ahead:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    outputs = run(pixels)
    if is_ahead:
        torch.accelerator.synchronize()
    return outputs, time.perf_counter() - start


def _first_to_finish(known: _Rates, images: int) -> str:
    return min(known, key=lambda name: known[name]["setup"] + images / known[name]["images_per_second"])


def _describe(known: _Rates, refused: Mapping[str, str]) -> str:
    rates = [f"{name} {it['images_per_second']:.0f} (ready in {it['setup']:.1f} s)" for name, it in known.items()]
    return ", ".join([*rates, *(f"{name} refused: {reason}" for name, reason in refused.items())])


def _reuse(known: _Rates, plain: Engine, job: Job, images: int) -> Engine | None:
    """The engine that an earlier measurement favours; None if it fails now."""
    name = _first_to_finish(known, images)
    if name == EAGER:
        return replace(plain, images_per_second=known[EAGER]["images_per_second"])
    try:
        candidate = _build(name, job)
    except Refused as reason:
        _LOG.info("frozen pass: %s, remembered as the fastest, is refused now and all are measured: %s", name, reason)
        return None
    return Engine(name, candidate.run, known[name]["images_per_second"], candidate.difference)


def _recall(memory: Path | None, place: str) -> _Rates | None:
    """What was measured before, if it can be read."""
    known: Any = recall(memory).get(place)
    try:
        sensible = all(rate["images_per_second"] > 0 and rate["setup"] >= 0 for rate in known.values())
    except (AttributeError, KeyError, TypeError):
        return None
    return known if sensible and EAGER in known and set(known) <= {EAGER, *BUILDERS} else None


def _remember(memory: Path | None, place: str, known: _Rates) -> None:
    if not memory:
        return
    try:
        remember(memory, place, known)
    except OSError as error:  # no reason to stop a run: the next one measures again
        _LOG.info("frozen pass: the measurement can't be kept: %s", error)


def _circumstances(job: Job) -> str:
    """All that a measurement depends on beside the network."""
    parts = [
        f"batch {'x'.join(map(str, job.pixels.shape))}",
        "bfloat16" if job.bfloat16 else "float32",
        str(layout_of(job.prefix)).removeprefix("torch."),
        hardware(job.pixels.device),
        f"{torch.get_num_threads()} threads",
        *(f"{package} {_version(package)}" for package in ("torch", "onnxruntime", "onnx")),
    ]
    return ", ".join(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _reason(error: Exception) -> str:
    """The error in one line; an interpreter's error has its cause in the last one."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[-1 if 'TorchScript interpreter' in lines[0] else 0]}"
