"""What a trial of a network changes, in it or in torch's random state, and puts back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfft.model.trace import Shape

_WITHOUT_STATE = ("cpu", "meta")  # the CPU's own state is always looked at


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the random state back afterwards; other accelerators of the machine are left alone."""
    devices = [] if device.type in _WITHOUT_STATE else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else None):
        yield


def seed_random(device: torch.device, seed: int) -> None:
    """Seed what `random_state_kept` puts back, and nothing else; `torch.manual_seed` seeds every accelerator."""
    torch.default_generator.manual_seed(seed)
    if device.type not in _WITHOUT_STATE:
        torch.get_device_module(device).manual_seed(seed)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """What the next random numbers depend on."""
    states = [torch.get_rng_state()]
    if device.type not in _WITHOUT_STATE:
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextmanager
def other_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let one module, and not its class, compute something else."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def hidden(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let tensors hold NaN for a while, without memory: what is computed meanwhile shows whether it reads them."""
    before = [(tensor, tensor.data) for tensor in tensors]
    for tensor in tensors:
        tensor.data = Shape(tuple(tensor.shape), (0,) * tensor.ndim, tensor.dtype).placeholder(0, tensor.device)
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def without_zeros(parameters: Sequence[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Give parameters that start at zero (a new head, an adapter) values for a while: they would hide all before."""
    zeros = [parameter for parameter in parameters if not parameter.any()]
    with random_state_kept(device), torch.no_grad():
        seed_random(device, 0)
        for parameter in zeros:
            parameter.normal_()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put modes and buffers back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
