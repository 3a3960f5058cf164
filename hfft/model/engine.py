"""Which software runs the frozen pass fastest on this machine: measured once, checked against torch, remembered.

The frozen part of a network runs once over all images before a phase trains the rest. Convolutions with BatchNorm
behind them, above all, run several times faster once the statistics are folded into the weights.
"""

import importlib
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from hfft.errors import ModelError
from hfft.files import read_json, write_json

_LOG = get_logger(__name__)

_Rates = Mapping[str, Mapping[str, float]]  # by engine: images_per_second, and setup in seconds
Run = Callable[[Tensor], tuple[Tensor, ...]]

EAGER = "torch"
"""Name of the engine that is torch as it trains."""
_ROUNDS = 3  # timed batches of each candidate; the fastest counts, as other work on the machine only slows down
_GLANCE = 4  # images that tell about how long the pass will take
_CHUNK = 4  # images at once on one core: what EfficientNet's layers make of them still fits into its cache
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
class _Job:
    """What is to be run, and eager torch's outputs in the run's precision and in float32."""

    prefix: nn.Module
    pixels: Tensor
    bfloat16: bool
    outputs: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]


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


class _Refused(Exception):
    """Why a candidate can't be used."""


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
        key: What the prefix is, for `memory`: equal for equal architecture and cut. Machine, versions, precision and
            the shape of the batch are added here.

    Raises:
        ModelError: If the one that was asked for is missing, can't run this prefix, or computes something else.
    """
    eager = Engine(EAGER, _eager(prefix, bfloat16), None, 0.0)
    if asked == EAGER:
        return eager
    place = f"{key}, {_circumstances(_Job(prefix, pixels, bfloat16, (), ()))}"
    known = _recall(memory, place) if asked not in _BUILDERS else None
    if asked not in _BUILDERS and not known and _is_short(eager.run, pixels, images):
        _LOG.info("frozen pass: torch; %d images are too few to look for something faster", images)
        return eager
    outputs, seconds = _timed(eager.run, pixels)
    exact = _eager(prefix, False)(pixels) if bfloat16 else outputs
    job = _Job(prefix, pixels, bfloat16, outputs, exact)
    if asked in _BUILDERS:
        return _insist(asked, job)
    if known and (engine := _reuse(known, eager, job, images)):
        return engine
    candidates, refused = _prepare(job)
    candidates = {EAGER: _Candidate(eager.run, 0.0, 0.0, seconds), **candidates}
    known = _measure(candidates, pixels)
    name = _first_to_finish(known, images)
    _LOG.info("frozen pass: %s; images/s: %s", name, _describe(known, refused))
    _remember(memory, place, known)
    return Engine(name, candidates[name].run, known[name]["images_per_second"], candidates[name].difference)


def _eager(prefix: nn.Module, bfloat16: bool) -> Run:
    """The prefix as it is, under autocast or not."""
    layout = _layout(prefix)

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bfloat16):
            return prefix(pixels.contiguous(memory_format=layout))

    return run


def _traced(job: _Job) -> Run:
    """TorchScript with the weights as constants: BatchNorm is folded into them, and bfloat16 casts are done once.

    The trace sees gray images: what it wrongly takes from them for a constant then shows in the check on real ones.
    """
    layout = _layout(job.prefix)
    gray = torch.zeros_like(job.pixels, memory_format=layout)
    autocast = torch.autocast(gray.device.type, torch.bfloat16, enabled=job.bfloat16, cache_enabled=False)
    with torch.no_grad(), autocast, _quiet():
        program = torch.jit.freeze(torch.jit.trace(job.prefix, (gray,), check_trace=False))

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(pixels.device.type, enabled=False):  # the casts are in the program
            return program(pixels.contiguous(memory_format=layout))

    return run


def _onnxruntime(job: _Job) -> Run:
    """Float32 on the CPU with as many threads as torch has, each with a few images of its own.

    They needn't wait for each other after every layer, nor for one whose core a data loader worker has taken.
    The exporter is the one on top of torch.jit.trace: the one on top of torch.export needs 3 to 5 times as long, and
    trips over a forward pass that ends in an exception (torch 2.14).
    """
    if job.pixels.device.type != "cpu":
        raise _Refused(f"it runs on the CPU and the model is on {job.pixels.device.type}")
    try:
        runtime = importlib.import_module("onnxruntime")
        importlib.import_module("onnx")  # the exporter needs it, and names no package when it is missing
    except ImportError as error:
        raise _Refused('it is not installed: pip install "hfft[fast]"') from error
    options = runtime.SessionOptions()
    chunk = max(size for size in range(1, _CHUNK + 1) if len(job.pixels) % size == 0)
    chunks, threads = len(job.pixels) // chunk, torch.get_num_threads()
    options.intra_op_num_threads = max(threads // chunks, 1)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # data loader workers want the cores
    options.log_severity_level = 3  # errors; a warning about the graph is of no use to a user
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), _quiet(), _silent():
        file = str(Path(folder) / "prefix.onnx")
        gray = torch.zeros_like(job.pixels[:chunk], memory_format=torch.contiguous_format)
        torch.onnx.export(job.prefix, (gray,), file, input_names=["pixels"], dynamo=False)
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    pool = ThreadPoolExecutor(min(threads, chunks))

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        parts = pixels.contiguous().split(chunk)
        done = pool.map(lambda part: session.run(None, {"pixels": part.numpy()}), parts)
        return tuple(torch.from_numpy(np.concatenate(leaf)) for leaf in zip(*done, strict=True))

    return run


_BUILDERS: dict[str, Callable[[_Job], Run]] = {"torch traced": _traced, "onnxruntime": _onnxruntime}


def _prepare(job: _Job) -> tuple[dict[str, _Candidate], dict[str, str]]:
    """The candidates that agree with eager torch, and for the others the reason, by name."""
    candidates, refused = {}, {}
    for name in _BUILDERS:
        try:
            candidates[name] = _build(name, job)
        except _Refused as reason:
            refused[name] = str(reason)
    return candidates, refused


def _build(name: str, job: _Job) -> _Candidate:
    """Build a candidate and check it; _Refused if it can't be built or run, or computes something else."""
    start = time.perf_counter()
    try:
        bare = _BUILDERS[name](job)
        dtypes = [output.dtype for output in job.outputs]

        def run(pixels: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs = bare(pixels)
            return tuple(output.to(dtype) for output, dtype in zip(outputs, dtypes, strict=True))

        run(job.pixels)
        outputs, seconds = _timed(run, job.pixels)  # TorchScript optimizes itself in its second run
    except _Refused:
        raise
    except Exception as error:  # compilers and exporters raise whatever they stumble over
        raise _Refused(_reason(error)) from error
    setup = time.perf_counter() - start
    return _Candidate(run, _check(outputs, job), setup, seconds)


def _check(outputs: tuple[Tensor, ...], job: _Job) -> float:
    """The largest relative difference from eager torch in the run's precision; _Refused if it is too large."""
    largest = 0.0
    for number, (output, eager, exact) in enumerate(zip(outputs, job.outputs, job.exact, strict=True)):
        if output.shape != eager.shape:
            raise _Refused(f"output {number} is {tuple(output.shape)}, in torch {tuple(eager.shape)}")
        size, distance = _distance(exact, torch.zeros_like(exact)), _distance(output, exact)
        limit = max(_SPREAD * _distance(eager, exact), _ROUNDING * size)
        if not distance <= limit:  # so that NaN is refused too
            raise _Refused(f"output {number} differs from torch by up to {distance:.2g}; {limit:.2g} is allowed")
        largest = max(largest, _distance(output, eager) / (size or 1.0))
    return largest


def _distance(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return float((left.float() - right.float()).abs().max())


def _insist(name: str, job: _Job) -> Engine:
    """An engine by name, not timed; ModelError if it is refused."""
    try:
        candidate = _build(name, job)
    except _Refused as reason:
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


def _is_short(eager: Run, pixels: Tensor, images: int) -> bool:
    glance = pixels[:_GLANCE]
    image = _timed(eager, glance)[1] / len(glance)
    return image * images < _SHORT_BATCHES * image * len(pixels) + _SHORT_SECONDS


def _timed(run: Run, pixels: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """What comes out, and the seconds it took."""
    start = time.perf_counter()
    outputs = run(pixels)
    if pixels.device.type != "cpu":
        torch.accelerator.synchronize()
    return outputs, time.perf_counter() - start


def _first_to_finish(known: _Rates, images: int) -> str:
    return min(known, key=lambda name: known[name]["setup"] + images / known[name]["images_per_second"])


def _describe(known: _Rates, refused: Mapping[str, str]) -> str:
    rates = [f"{name} {it['images_per_second']:.0f} (ready in {it['setup']:.1f} s)" for name, it in known.items()]
    return ", ".join([*rates, *(f"{name} refused: {reason}" for name, reason in refused.items())])


def _reuse(known: _Rates, eager: Engine, job: _Job, images: int) -> Engine | None:
    """The engine that an earlier measurement favours; None if it fails now."""
    name = _first_to_finish(known, images)
    if name == EAGER:
        return replace(eager, images_per_second=known[EAGER]["images_per_second"])
    try:
        candidate = _build(name, job)
    except _Refused as reason:
        _LOG.info("frozen pass: %s, remembered as the fastest, is refused now and all are measured: %s", name, reason)
        return None
    return Engine(name, candidate.run, known[name]["images_per_second"], candidate.difference)


def _recall(memory: Path | None, place: str) -> _Rates | None:
    """What was measured before, if it can be read."""
    known: Any = _read(memory).get(place)
    try:
        sensible = all(rate["images_per_second"] > 0 and rate["setup"] >= 0 for rate in known.values())
    except (AttributeError, KeyError, TypeError):
        return None
    return known if sensible and EAGER in known and set(known) <= {EAGER, *_BUILDERS} else None


def _remember(memory: Path | None, place: str, known: _Rates) -> None:
    if not memory:
        return
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {**_read(memory), place: known})
    except OSError as error:  # no reason to stop a run: the next one measures again
        _LOG.info("frozen pass: the measurement can't be kept: %s", error)


def _read(memory: Path | None) -> dict[str, Any]:
    """The file's content; empty where there is none that can be read."""
    try:
        content = read_json(memory) if memory else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _circumstances(job: _Job) -> str:
    """All that a measurement depends on beside the network."""
    parts = [
        f"batch {'x'.join(map(str, job.pixels.shape))}",
        "bfloat16" if job.bfloat16 else "float32",
        str(_layout(job.prefix)).removeprefix("torch."),
        _processor(job.pixels.device),
        f"{torch.get_num_threads()} threads",
        *(f"{package} {_version(package)}" for package in ("torch", "onnxruntime", "onnx")),
    ]
    return ", ".join(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor(device: torch.device) -> str:
    """The name of what computes, as the system gives it."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = Path("/proc/cpuinfo")  # Linux
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _layout(prefix: nn.Module) -> torch.memory_format:
    """Channels last where the convolutions' weights are; a 1x1 convolution fits both and doesn't tell."""
    weights = [weight for weight in prefix.parameters() if weight.dim() == 4]
    last = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    return torch.channels_last if last else torch.contiguous_format


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what is known: TorchScript is deprecated, and a trace keeps the batch's shape as a constant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning)
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning, r"torch\.onnx")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
        # The trace reads every attribute of a model, deprecated ones too.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what is written to stderr: an export that fails prints the whole network, in torch 2.14 unconditionally."""
    torch._C._jit_set_onnx_log_output_stream("stderr")  # which no buffer delays until after this
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _reason(error: Exception) -> str:
    """The error in one line; an interpreter's error has its cause in the last one."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[-1 if 'TorchScript interpreter' in lines[0] else 0]}"
