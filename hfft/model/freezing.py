"""Unfreeze parts, hold everything else in evaluation mode, and prove that nothing frozen moved."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from hfft.errors import ModelError, TrainingError
from hfft.model.anatomy import Anatomy
from hfft.model.restoring import left_as_it_was, random_state_kept

_BATCHNORM = nn.modules.batchnorm._BatchNorm
_NORMS = (_BATCHNORM, nn.LayerNorm, nn.GroupNorm)


def trainable_names(
    model: nn.Module, anatomy: Anatomy, unfreeze: str | Mapping[str, int | str | tuple[str, ...]]
) -> set[str]:
    """Names of the parameters that a phase with this `unfreeze` trains.

    The head always trains. `blocks`, `stages` and `layers` count from the end and take what lies behind them along:
    the norm, and every later block. `{blocks: "first N"}` is the first N blocks alone, without the stem in front of
    them (surgical fine-tuning, https://hf.co/papers/2210.11466). A layer is a module that owns parameters, counted
    without the head.

    Raises:
        ModelError: If more was asked for than there is.
    """
    parameters = {name for name, _ in model.named_parameters()}
    if unfreeze == "head":
        chosen = set()
    elif unfreeze == "all":
        chosen = parameters
    elif unfreeze == "norm":
        chosen = {name for name in parameters if _is_norm(model, name)}
    elif unfreeze == "bias":
        chosen = {name for name in parameters if re.search(r"(\.|^|_)bias$", name)}
    else:
        assert not isinstance(unfreeze, str)
        ((word, amount),) = unfreeze.items()
        if isinstance(amount, int):
            chosen = _last(model, anatomy, word, amount)
        elif isinstance(amount, str):
            number = int(amount.removeprefix("first "))
            _check_amount("blocks", number, len(anatomy.blocks), end="first")
            chosen = {name for block in anatomy.blocks[:number] for name in block.tensors}
        else:
            chosen = {tensor for name in amount for tensor in _named_parts(anatomy, name)}
    return parameters & {*anatomy.part("head").tensors, *chosen}


def set_trainable(model: nn.Module, names: set[str]) -> None:
    """Let exactly these parameters have gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


class Freeze:
    """Keeps what is frozen frozen while a Trainer works on the model.

    A module is held in evaluation mode when it, or for a module without tensors the nearest one around it that has
    some, holds no trainable parameter: so dropout and drop path of frozen parts are off, and their BatchNorm
    statistics rest. BatchNorm in released parts is held too, unless `batchnorm` is `train`: the running statistics
    of a pretrained network are worth more than those of a few small batches.
    """

    def __init__(self, model: nn.Module, *, batchnorm: str = "eval") -> None:
        """Note what is frozen now, by `requires_grad`; `batchnorm` is `eval` or `train`, for released layers."""
        self._model = model
        self._held = held_modules(model, batchnorm)
        self._before = hash_tensors(self._frozen_tensors())

    @property
    def names(self) -> frozenset[str]:
        """Of all frozen tensors: parameters, and buffers of modules in evaluation mode."""
        return frozenset(self._before)

    def hold(self) -> None:
        """Put what is frozen back into evaluation mode; `model.train()` undoes it at every step of a Trainer."""
        for module in self._held:
            module.training = False

    def prove(self, model: nn.Module | None = None) -> dict[str, int]:
        """Compare every frozen tensor, by name, with its bytes at the start: of this network, or of a copy.

        Returns:
            Numbers of `tensors` and `bytes` compared, and of those `changed`: none.

        Raises:
            TrainingError: If one changed; names it.
        """
        network = self._model if model is None else model
        tensors = {name: value for name, value in _tensors(network).items() if name in self._before}
        after = hash_tensors(tensors)
        changed = [name for name, value in self._before.items() if after.get(name) != value]
        if changed:
            raise TrainingError(f"{len(changed)} frozen tensors changed during the phase, the first is {changed[0]}")
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        return {"tensors": len(sizes), "bytes": sum(sizes), "changed": 0}

    def _frozen_tensors(self) -> dict[str, torch.Tensor]:
        held = {id(module) for module in self._held}
        names = {name for name, value in self._model.named_parameters() if not value.requires_grad}
        for prefix, module in self._model.named_modules():
            if id(module) in held:
                names |= {f"{prefix}.{name}".removeprefix(".") for name in module._buffers}
        return {name: value for name, value in _tensors(self._model).items() if name in names}


def unused_parameters(model: nn.Module, pixels: torch.Tensor) -> set[str]:
    """Names of the trainable parameters that the logits don't depend on, such as DINOv2's mask token.

    They never get a gradient, and DistributedDataParallel waits for one unless they are frozen. Found by one forward
    and backward pass in evaluation mode, of any pixels (B, C, H, W) where the model is; gradients, modes, buffers and
    the random state are left as they were.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        return set()
    with left_as_it_was(model), random_state_kept(pixels.device), torch.enable_grad():
        logits = model.eval()(pixel_values=pixels).logits  # (B, K)
        gradients = torch.autograd.grad(logits.sum(), list(trainable.values()), allow_unused=True)
    return {name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None}


def held_modules(model: nn.Module, batchnorm: str) -> list[nn.Module]:
    """The modules that stay in evaluation mode while the rest trains: see Freeze."""
    held = _frozen_modules(model)
    if batchnorm == "eval":
        held += [module for module in model.modules() if isinstance(module, _BATCHNORM)]
    return list({id(module): module for module in held}.values())


def set_modes(model: nn.Module, batchnorm: str) -> None:
    """Put each module in the mode that it trains in."""
    model.train()
    for module in held_modules(model, batchnorm):
        module.training = False


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """A hash of each tensor's content, by name; on as many threads as torch uses."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib lets other threads run meanwhile
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def frozen_parts(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Names of the parts without any trainable parameter."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {part.name for part in anatomy.parts if not trainable & set(part.tensors)}


def _last(model: nn.Module, anatomy: Anatomy, word: str, amount: int) -> set[str]:
    norm = set(anatomy.part("norm").tensors)
    if word == "layers":  # in front of the head
        parameters = dict(model.named_parameters())
        names = [name for part in anatomy.parts[:-1] for name in part.tensors if name in parameters]
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        _check_amount(word, amount, len(layers))
        return {name for name in names if name.rpartition(".")[0] in layers[-amount:]}
    if word == "blocks":
        _check_amount(word, amount, len(anatomy.blocks))
        return norm.union(*(block.tensors for block in anatomy.blocks[-amount:]))
    stages = sorted({block.stage for block in anatomy.blocks if block.stage is not None})
    if not stages:
        raise ModelError("unfreeze: this network has no stages; use {blocks: N}")
    _check_amount(word, amount, len(stages))
    return norm.union(*(block.tensors for block in anatomy.blocks if block.stage in stages[-amount:]))


def _check_amount(word: str, amount: int, there: int, *, end: str = "last") -> None:
    if amount > there:
        raise ModelError(f"unfreeze: asked for the {end} {amount} {word}, but the network has {there}")


def _named_parts(anatomy: Anatomy, name: str) -> Iterable[str]:
    """Tensors of `stem`, `norm`, `head`, `block 3` or `block 0..2`."""
    span = re.fullmatch(r"block (\d+)\.\.(\d+)", name)
    names = [f"block {number}" for number in range(int(span[1]), int(span[2]) + 1)] if span else [name]
    return [tensor for part in names for tensor in anatomy.part(part).tensors]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}


def _is_norm(model: nn.Module, name: str) -> bool:
    """Norm layers of a class of their own (ConvNeXt's, timm's) are known by the name of the module."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, _NORMS) or bool(re.search(r"(norm|bn)\w*\.(weight|bias)$", name))


def _frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose nearest module with tensors, themselves or around them, has no trainable parameter."""
    frozen: list[nn.Module] = []

    def visit(module: nn.Module, around_is_frozen: bool) -> None:
        parameters = list(module.parameters())
        is_frozen = around_is_frozen
        if parameters or next(module.buffers(), None) is not None:
            is_frozen = not any(parameter.requires_grad for parameter in parameters)
        if is_frozen:
            frozen.append(module)
        for child in module.children():
            visit(child, is_frozen)

    visit(model, around_is_frozen=False)
    return frozen


def _hash(tensor: torch.Tensor) -> bytes:
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=16).digest()
