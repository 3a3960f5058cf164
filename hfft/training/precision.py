"""`precision: auto`: whether a phase trains faster in bfloat16 on this machine."""

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from hfft.model.fingerprint import hash_architecture
from hfft.model.freezing import set_modes
from hfft.model.restoring import random_state_kept
from hfft.recipe.contradictions import solving_problems
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.replay.split_point import Prefix, SplitPoint, find_split_point
from hfft.system.files import recall, remember
from hfft.system.launch import spread_by
from hfft.system.machine import hardware, has_native_bfloat16
from hfft.training.plan import prepare_phase

_IMAGES = 4  # per step that is timed
_STEPS = 3  # in each precision; the first warms up
_PRECISIONS: tuple[str, ...] = ("float32", "bfloat16")
_GAIN = 0.9  # bfloat16's time, at most, as a share of float32's

_LOG = get_logger(__name__)


def fastest_precision(
    model: Any, spec: PhaseSpec, pixels: torch.Tensor, *, replays: bool, memory: Path | None = None
) -> str:
    """`bfloat16` where the processor has it and trains faster in it, else `float32`.

    An accelerator with native bfloat16 is taken at its word. A CPU is asked: some of its kernels are slower in
    bfloat16, such as depthwise convolutions backwards (torch 2.14 with AVX512_BF16).

    Args:
        model: A plain classifier; not changed.
        spec: The phase that a step is timed of.
        pixels: An image as the network takes it, (1, C, H, W); its shape counts.
        replays: Whether what is frozen may be computed once, so that the rest of a step is what counts.
        memory: JSON file of earlier answers, so that another run of a recipe gets the same one; None to forget.
    """
    if not has_native_bfloat16():
        return "float32"
    if torch.accelerator.is_available():
        _LOG.info("precision: bfloat16, which this accelerator computes in")
        return "bfloat16"
    place = _circumstances(model, spec, pixels, replays=replays)
    known = recall(memory).get(place)
    if known in _PRECISIONS:
        return known
    network = prepare_phase(copy.deepcopy(model), spec, pixels)
    split_point = find_split_point(network, pixels, spec.batchnorm) if replays else None
    seconds = _seconds(network, split_point, pixels.expand(_IMAGES, *pixels.shape[1:]), spec.batchnorm)
    best = "bfloat16" if seconds["bfloat16"] < _GAIN * seconds["float32"] else "float32"
    times = " and ".join(f"{1000 * seconds[name]:.0f} ms in {name}" for name in _PRECISIONS)
    _LOG.info(f"precision: {best}; {_IMAGES} images of phase {spec.name} train in {times}")
    if memory is not None:
        with suppress(OSError):  # the next run measures again
            remember(memory, place, best)
    return best


def phases_in(recipe: Recipe, precision: str) -> tuple[PhaseSpec, ...]:
    """The phases as they run in a precision; one that sets bf16 or fp16 itself is left alone.

    `auto` is taken for `bfloat16` where the device has that. A head that the recipe or the launch keeps from being
    solved takes steps.
    """
    is_bfloat16 = precision == "bfloat16" or (precision == "auto" and has_native_bfloat16())
    phases = []
    for phase in recipe.phases:
        if phase.solver == "auto" and phase.is_solved and (spread_by() or solving_problems(phase, recipe)):
            phase = dataclasses.replace(phase, solver="steps")
        if is_bfloat16 and not {"bf16", "fp16"} & set(phase.arguments):
            phase = dataclasses.replace(phase, arguments={**phase.arguments, "bf16": True})
        phases.append(phase)
    return tuple(phases)


def _circumstances(model: Any, spec: PhaseSpec, pixels: torch.Tensor, *, replays: bool) -> str:
    """All that the answer depends on."""
    architecture = hash_architecture(dict(model.named_modules()))
    parts = [
        f"{model.config.model_type} {model.config.name_or_path} ({architecture})",
        f"{spec.adapter or spec.unfreeze}, batchnorm {spec.batchnorm}, replays {replays}",
        f"images {'x'.join(map(str, pixels.shape[1:]))}",
        f"{hardware(pixels.device)}, {torch.get_num_threads()} threads",
    ]
    return ", ".join(parts)


def step_seconds(model: Any, spec: PhaseSpec, pixels: torch.Tensor) -> float:
    """Seconds per image of a training step in float32, behind what replay computes once; the model isn't changed."""
    network = prepare_phase(copy.deepcopy(model), spec, pixels[:1])
    split_point = find_split_point(network, pixels[:1], spec.batchnorm)
    return _seconds(network, split_point, pixels, spec.batchnorm, _PRECISIONS[:1])["float32"] / len(pixels)


def _seconds(
    network: Any,
    split_point: SplitPoint | None,
    pixels: torch.Tensor,
    batchnorm: str,
    precisions: Sequence[str] = _PRECISIONS,
) -> dict[str, float]:
    """Of the fastest step in each precision, in turn, so that a busy moment of the machine hits both."""
    entering = {}
    if split_point is not None:
        for name in precisions:
            with torch.no_grad(), _autocast(name):
                entering[name] = Prefix(network.eval(), [split_point]).eval()(pixels)
    set_modes(network, batchnorm)
    seconds = dict.fromkeys(precisions, math.inf)
    with random_state_kept(pixels.device), nullcontext() if split_point is None else split_point.bypassed():
        for name in (*precisions,) * _STEPS:
            inputs = pixels if split_point is None else split_point.feed(entering[name])
            begun = time.perf_counter()
            with _autocast(name):
                _step(network, inputs)
            if pixels.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
    return seconds


def _step(network: Any, pixels: torch.Tensor) -> None:
    network(pixel_values=pixels).logits.float().logsumexp(1).sum().backward()


def _autocast(name: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16")
