"""The frozen pass as a program: eager torch, traced torch, or onnxruntime."""

import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[Tensor], tuple[Tensor, ...]]

_CHUNK = 4  # images at once on one core: what EfficientNet's layers make of them still fits into its cache


@dataclass(frozen=True)
class Job:
    """What is to be run, and eager torch's outputs in the run's precision and in float32.

    Attributes:
        prefix: In evaluation mode and frozen.
        pixels: Real images, a full batch, (B, C, H, W).
        bfloat16: Whether torch runs under bfloat16 autocast.
        outputs: What eager torch makes of them in that precision.
        exact: And in float32.
    """

    prefix: nn.Module
    pixels: Tensor
    bfloat16: bool
    outputs: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]


class Refused(Exception):
    """Why a candidate can't be used."""


def eager(prefix: nn.Module, bfloat16: bool) -> Run:
    """The prefix as it is, under autocast or not."""
    layout = layout_of(prefix)

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bfloat16):
            return prefix(pixels.contiguous(memory_format=layout))

    return run


def _traced(job: Job) -> Run:
    """TorchScript with the weights as constants: BatchNorm is folded into them, and bfloat16 casts are done once.

    The trace sees gray images: what it wrongly takes from them for a constant then shows in the check on real ones.
    """
    layout = layout_of(job.prefix)
    gray = torch.zeros_like(job.pixels, memory_format=layout)
    autocast = torch.autocast(gray.device.type, torch.bfloat16, enabled=job.bfloat16, cache_enabled=False)
    with torch.no_grad(), autocast, _quiet():
        program = torch.jit.freeze(torch.jit.trace(job.prefix, (gray,), check_trace=False))

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(pixels.device.type, enabled=False):  # the casts are in the program
            return program(pixels.contiguous(memory_format=layout))

    return run


def _onnxruntime(job: Job) -> Run:
    """Float32 on the CPU with as many threads as torch has, each with a few images of its own.

    They needn't wait for each other after every layer, nor for one whose core a data loader worker has taken.
    The exporter is the one on top of torch.jit.trace: the one on top of torch.export needs 3 to 5 times as long, and
    trips over a forward pass that ends in an exception (torch 2.14).
    """
    if job.pixels.device.type != "cpu":
        raise Refused(f"it runs on the CPU and the model is on {job.pixels.device.type}")
    try:
        runtime = importlib.import_module("onnxruntime")
        importlib.import_module("onnx")  # the exporter needs it, and names no package when it is missing
    except ImportError as error:
        raise Refused('it is not installed: pip install "hfft[fast]"') from error
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


BUILDERS: dict[str, Callable[[Job], Run]] = {"torch traced": _traced, "onnxruntime": _onnxruntime}
"""What makes a program, by the name of its engine; Refused, or whatever an exporter raises, where it can't."""


def layout_of(prefix: nn.Module) -> torch.memory_format:
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
