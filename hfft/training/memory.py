"""How much memory a training step keeps for its backward pass, from shapes alone."""

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from hfft.model.freezing import set_modes
from hfft.model.restoring import left_as_it_was
from hfft.training.failures import ONE_VALUE


def activation_bytes(model: nn.Module, shape: tuple[int, ...], batchnorm: str = "eval") -> int | None:
    """Bytes of float32 activations that one training step keeps, without weights.

    A forward pass is made in which autograd reports what it saves: what a frozen part computes before the first
    trainable parameter is not saved, and counts nothing. On the meta device this takes no memory itself.
    Kernels differ in what they save (attention most): another device may need some 20 % more or less.

    Args:
        model: As `prepare_phase` left it.
        shape: Of the pixels, (B, C, H, W).
        batchnorm: The phase's.

    Returns:
        The bytes, or None for a network whose forward pass reads values, which there are none of on the meta device.
    """
    device = next(model.parameters()).device
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor  # and autograd keeps it, so that no storage is used twice

    try:
        with left_as_it_was(model), saved_tensors_hooks(note, lambda tensor: tensor):
            set_modes(model, batchnorm)
            outputs = model(pixel_values=torch.zeros(shape, device=device))  # holds what was saved
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
        return None
    del outputs
    return sum(kept.values())


def refuses_one_image(model: nn.Module, shape: tuple[int, ...], batchnorm: str) -> bool:
    """Whether a BatchNorm that is trained has a single value per channel where a batch has one image.

    Args:
        model: As `prepare_phase` left it; may be on the meta device.
        shape: Of the pixels, (1, C, H, W).
        batchnorm: The phase's.
    """
    try:
        with left_as_it_was(model), torch.no_grad():
            set_modes(model, batchnorm)
            model(pixel_values=torch.zeros(shape, device=next(model.parameters()).device))
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        return True
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
    return False
