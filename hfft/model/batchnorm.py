"""BatchNorm layers that take their statistics over the batches of all processes, for one phase."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfft.errors import ModelError, RecipeError

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def synchronised(model: nn.Module, title: str) -> Iterator[None]:
    """Put torch's SyncBatchNorm in the place of BatchNorm, and take it out again: a later phase may want its own.

    Args:
        model: On one process nothing is replaced.
        title: Of the phase, for the message.

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
