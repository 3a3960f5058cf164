"""What runs the frozen part of a network over all images once: eager torch, or onnxruntime on the CPU.

onnxruntime is verified against torch on real images each time. Which of them is faster on this machine is measured
once and remembered.
"""

import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from hfft.errors import ModelError, first_line
from hfft.model.fingerprint import is_channels_last
from hfft.system.files import recall, remember
from hfft.system.machine import hardware

Run = Callable[..., tuple[Tensor, ...]]

EAGER, ONNXRUNTIME = "torch", "onnxruntime"
_CHUNK = 4  # images at once on one core: what EfficientNet's layers make of them still fits into its cache
_ROUNDS = 3  # timed batches of each engine; the fastest counts, as other work on the machine only slows down
_SAMPLE = 4  # images that show about how long the pass will take
_BEHIND = 1.5  # times the faster engine's seconds: the other one is timed no further
_SHORT_BATCHES, _SHORT_SECONDS = 20, 8.0  # a measurement takes about a third of this: a shorter pass can't repay it
_ROUNDING = 1e-4  # of an output's largest value; other orders of float32 sums were seen to differ by up to 1e-5
_SPREAD = 3.0  # times bfloat16's own distance from float32; two bfloat16 programs differ by about one such distance

_LOG = get_logger(__name__)


class _Refused(Exception):
    """Why onnxruntime can't be used."""


@dataclass(frozen=True)
class Engine:
    """A way to run the frozen part on pixels of the shape that it was chosen with; its speed if that was measured."""

    name: str
    run: Run
    images_per_second: float | None = None


@dataclass(frozen=True)
class _Speed:
    """Images per second of both engines, and the seconds until onnxruntime is ready."""

    torch: float
    onnxruntime: float
    setup: float

    def favours_onnxruntime(self, images: int) -> bool:
        return self.setup + images / self.onnxruntime < images / self.torch


def choose_engine(
    network: nn.Module,
    pixels: Tensor,
    *,
    asked: str,
    autocast: torch.dtype | None,
    images: int,
    memory: Path | None = None,
    key: str = "",
) -> Engine:
    """The engine that finishes a pass first, its preparation included.

    onnxruntime must agree with eager torch on the given images: in float32 up to rounding; in bfloat16 it may be no
    further from float32 than a few times what eager bfloat16 is.

    Args:
        network: In evaluation mode; pixels -> flat tuple of tensors with B rows each.
        pixels: Real images (B, C, H, W) float32, a full batch, on the network's device.
        asked: EAGER, the only one whose float32 outputs are bit-equal to those of training; ONNXRUNTIME; or "auto".
        autocast: The type that torch computes in; None is float32. In float16 it is always torch.
        images: How many the pass will run over; for few, nothing is measured.
        memory: JSON file of earlier measurements, in which `key` says what the network is.
        key: See `memory`.

    Raises:
        ModelError: If onnxruntime was asked for and is missing, can't run this network, or computes something else.
    """
    plain = Engine(EAGER, eager(network, autocast))
    if asked == EAGER or autocast is torch.float16:
        return plain
    try:
        _check_available(pixels.device)
        if asked == ONNXRUNTIME:
            return Engine(ONNXRUNTIME, _verified_onnxruntime(network, pixels, autocast))
        circumstances = f"{key}, {_circumstances(network, pixels, autocast)}"
        run, speed = plain.run, _recall(memory, circumstances)
        if speed is None and _is_short(run, pixels, images):
            _LOG.info(f"frozen pass: torch; {images} images are too few to try onnxruntime")
            return plain
        if speed is None or speed.favours_onnxruntime(images):
            begun = time.perf_counter()
            run = _verified_onnxruntime(network, pixels, autocast)
            speed = speed or _measure(plain.run, run, pixels, time.perf_counter() - begun)
            if memory is not None:
                with suppress(OSError):  # the next run measures again
                    remember(memory, circumstances, vars(speed))
        if speed.favours_onnxruntime(images):
            return Engine(ONNXRUNTIME, run, speed.onnxruntime)
        return Engine(EAGER, plain.run, speed.torch)
    except _Refused as reason:
        if asked == ONNXRUNTIME:
            raise ModelError(
                f"replay.engine: onnxruntime can't be used: {reason}; auto uses it where it can"
            ) from None
        _LOG.info(f"frozen pass: torch; onnxruntime refused: {reason}")
        return plain


def scoring_engine(name: str | None) -> Callable[[nn.Module, Tensor], Run] | None:
    """What chooses how a network predicts: onnxruntime where it can and agrees with torch; None for torch itself."""
    if name != ONNXRUNTIME:
        return None

    def choose(network: nn.Module, pixels: Tensor) -> Run:
        try:
            engine = choose_engine(network, pixels, asked=name, autocast=None, images=len(pixels))
        except ModelError as reason:
            _LOG.info(f"scoring: torch, as {reason}")
            return eager(network, None)

        def run(batch: Tensor) -> tuple[Tensor, ...]:  # of the size of the first one, or smaller
            filled = torch.cat([batch, batch[-1:].expand(len(pixels) - len(batch), *batch.shape[1:])])
            return tuple(output[: len(batch)] for output in engine.run(filled))

        return run

    return choose


def eager(network: nn.Module, autocast: torch.dtype | None) -> Run:
    """A network as it is, in the memory format of its weights and the type that it computes in."""
    layout = _memory_format(network)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor for tensor in inputs)
        with torch.no_grad(), torch.autocast(inputs[0].device.type, autocast, enabled=autocast is not None):
            return network(*inputs)

    return run


def _check_available(device: torch.device) -> None:
    if device.type != "cpu":
        raise _Refused(f"it runs on the CPU and the model is on {device.type}")
    try:
        for name in ("onnxruntime", "onnx"):  # the exporter needs onnx, and names no package when it is missing
            importlib.import_module(name)
    except ImportError:
        raise _Refused('it is not installed: pip install "hfft[fast]"') from None


def _verified_onnxruntime(network: nn.Module, pixels: Tensor, autocast: torch.dtype | None) -> Run:
    """With the types of eager torch's outputs; _Refused if it computes something else."""
    expected = eager(network, autocast)(pixels)
    exact = eager(network, None)(pixels) if autocast is not None else expected
    try:
        program = _onnxruntime(network, pixels)

        def run(pixels: Tensor) -> tuple[Tensor, ...]:
            return tuple(output.to(plain.dtype) for output, plain in zip(program(pixels), expected, strict=True))

        outputs = run(pixels)
    except Exception as error:  # exporters raise whatever they stumble over
        raise _Refused(f"{type(error).__name__}: {first_line(error)}") from error
    for number, (output, plain, true) in enumerate(zip(outputs, expected, exact, strict=True)):
        if output.shape != plain.shape:
            raise _Refused(f"output {number} is {tuple(output.shape)}, in torch {tuple(plain.shape)}")
        distance = _distance(output, true)
        limit = max(_SPREAD * _distance(plain, true), _ROUNDING * float(true.float().abs().max()))
        if not distance <= limit:  # so that NaN is refused too
            raise _Refused(f"output {number} differs from torch by up to {distance:.2g}; {limit:.2g} is allowed")
    return run


def _onnxruntime(network: nn.Module, pixels: Tensor) -> Run:
    """Float32 on the CPU; each of torch's threads has a few images of its own, and waits for no other in each layer.

    The exporter is the one on top of torch.jit.trace: the one on top of torch.export needs 3 to 5 times as long, and
    trips over a forward pass that ends in an exception (torch 2.14). It sees gray images: what it wrongly takes from
    them for a constant then shows in the check on real ones.
    """
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    chunk = max(size for size in range(1, _CHUNK + 1) if len(pixels) % size == 0)
    chunks, threads = len(pixels) // chunk, torch.get_num_threads()
    options.intra_op_num_threads = max(threads // chunks, 1)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # data loader workers want the cores
    options.log_severity_level = 3  # errors; a warning about the graph is of no use to a user
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), _silent_export():
        file = str(Path(folder) / "network.onnx")
        gray = torch.zeros_like(pixels[:chunk], memory_format=torch.contiguous_format)
        torch.onnx.export(network, (gray,), file, input_names=["pixels"], dynamo=False)
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    pool = ThreadPoolExecutor(min(threads, chunks))

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        parts = pixels.contiguous().split(chunk)
        done = pool.map(lambda part: session.run(None, {"pixels": part.numpy()}), parts)
        return tuple(torch.from_numpy(np.concatenate(leaf)) for leaf in zip(*done, strict=True))

    return run


@contextmanager
def _silent_export() -> Iterator[None]:
    """Hide known warnings of the exporter, and all of stderr: a failing export prints the network (torch 2.14)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning)
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning, r"torch\.onnx")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # read, too
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
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


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


def _is_short(run: Run, pixels: Tensor, images: int) -> bool:
    per_image = _seconds(run, pixels[:_SAMPLE]) / len(pixels[:_SAMPLE])
    return per_image * images < _SHORT_BATCHES * per_image * len(pixels) + _SHORT_SECONDS


def _measure(plain: Run, other: Run, pixels: Tensor, setup: float) -> _Speed:
    """Batches in turn, so that a busy moment of the machine hits both engines alike."""
    best = [_seconds(plain, pixels), _seconds(other, pixels)]
    for _ in range(_ROUNDS - 1):
        slow = _BEHIND * min(best)
        for number, run in enumerate((plain, other)):
            if best[number] <= slow:
                best[number] = min(best[number], _seconds(run, pixels))
    speed = _Speed(len(pixels) / best[0], len(pixels) / best[1], setup)
    _LOG.info(
        f"frozen pass: torch {speed.torch:.0f} images/s, onnxruntime {speed.onnxruntime:.0f} images/s (ready in "
        f"{setup:.1f} s)"
    )
    return speed


def _seconds(run: Run, pixels: Tensor) -> float:
    begun = time.perf_counter()
    run(pixels)
    return time.perf_counter() - begun


def _recall(memory: Path | None, circumstances: str) -> _Speed | None:
    with suppress(KeyError, TypeError):  # nothing that this version has written
        return _Speed(**recall(memory)[circumstances])


def _circumstances(network: nn.Module, pixels: Tensor, autocast: torch.dtype | None) -> str:
    dtype, layout = (str(one).removeprefix("torch.") for one in (autocast or torch.float32, _memory_format(network)))
    packages = (f"{name} {importlib.import_module(name).__version__}" for name in ("torch", "onnxruntime", "onnx"))
    batch, threads = f"batch {'x'.join(map(str, pixels.shape))}", f"{torch.get_num_threads()} threads"
    return ", ".join([batch, dtype, layout, hardware(pixels.device), threads, *packages])


def _memory_format(network: nn.Module) -> torch.memory_format:
    return torch.channels_last if any(map(is_channels_last, network.parameters())) else torch.contiguous_format
