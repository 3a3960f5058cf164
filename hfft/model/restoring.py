"""What a trial or a phase changes for a while, in a network or in torch's random state, and puts back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfft.errors import ModelError, RecipeError
from hfft.model.trace import Shape

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
    """Give parameters that start at zero (a new head, an adapter) values: they would hide all before."""
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


@contextmanager
def synchronised(model: nn.Module, title: str) -> Iterator[None]:
    """Let the BatchNorm layers take their statistics over the batches of all processes, for the phase of this title.

    Raises:
        RecipeError: On several processes without a GPU each.
        ModelError: If a layer does more than BatchNorm, which would be lost.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    if str(state.device) == "cpu":
        raise RecipeError(f"{title}: batchnorm: sync needs a GPU for each process, as torch has it for GPUs only")
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    try:
        for path, layer in layers:
            _put(model, path, _synchronised(layer, f"{title}: batchnorm: sync: {path}"))
        yield
    finally:
        for path, layer in layers:
            now = model.get_submodule(path)
            layer._parameters, layer._buffers, layer.training = now._parameters, now._buffers, now.training
            _put(model, path, layer)


def _synchronised(layer: _BatchNorm, where: str) -> nn.Module:
    if type(layer) in _PLAIN:
        return nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    if type(layer).__module__.startswith("timm."):  # torch's conversion loses the activation that timm's layer has
        from timm.layers import BatchNormAct2d, convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]

        if type(layer) is BatchNormAct2d:
            return convert_sync_batchnorm(layer)
    raise ModelError(
        f"{where} is a {type(layer).__name__}, which torch can't synchronise; set batchnorm: eval or train"
    )


def _put(model: Any, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
