"""Split points: what enters the part behind one is captured once, and fed to that part again and again.

No code per architecture: the order of modules is traced, those in front of the split point are answered for, and it is
believed only after the network has computed the same with and without it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hfft.model.anatomy import PEFT_PREFIX
from hfft.model.fingerprint import hash_architecture, hash_modules, is_channels_last, own_tensors
from hfft.model.freezing import set_modes
from hfft.model.restoring import (
    hidden,
    left_as_it_was,
    other_forward,
    random_state_kept,
    random_states,
    seed_random,
    without_zeros,
)
from hfft.model.trace import Call, Shape, shape_of, trace

_TRIES = 24  # the first clean split point is among the first few candidates
_TOLERANCE = 1e-4  # relative, of the logits
_ROUNDING = 1e-2  # relative, of what enters: TensorFloat-32's, which differs between sizes of a batch, and no more
_LOUD = 3  # times the others' contrast has the third image: what depends on its neighbours shows


class _Reached(Exception):
    """The split point was reached: nothing behind it needs to be computed."""


class _Input(NamedTuple):
    """A tensor with one row per image that enters a module: where in its arguments, and how it lies in memory."""

    number: int
    dtype: torch.dtype
    memory_format: torch.memory_format


class SplitPoint:
    """The entry of one module, at `path`, through which all that the head learns of an image goes.

    Attributes:
        depth: Modules that run before it: the order of the split points of a network.
        behind: Parameters and buffers of modules that are entered behind it, and of none in front.
    """

    def __init__(self, model: nn.Module, path: str, calls: Mapping[str, Call], pixels: torch.Tensor) -> None:
        """Look at what enters the module, with images (2, C, H, W) and a model in evaluation mode.

        Raises:
            ValueError: If that isn't made of tensors with one row per image, which depends on no other image as behind
                a BatchNorm without running statistics, and of what all images share.
        """
        entered = calls[path].entered
        self.path = path.removeprefix(PEFT_PREFIX)
        self.depth = sum(call.entered < entered for call in calls.values())
        self._front, self.behind = _front_and_behind(model, calls, entered)
        self._image_shape = tuple(pixels.shape[1:])
        self._model = model
        self._module = model.get_submodule(path)
        self._answers = {name: calls[name].output for name in _skippable(calls, entered)}
        leaves, self._structure = pytree.tree_flatten(self._entering(pixels))
        more = pytree.tree_leaves(self._entering(torch.cat([pixels, _LOUD * pixels[:1]])))
        self._inputs: list[_Input] = []
        self._shared: list[Any] = [None] * len(leaves)  # what all images share
        for number, pair in enumerate(zip(leaves, more, strict=True)):
            shape = shape_of(*pair)
            if isinstance(shape, Shape) and shape.is_per_image:
                if not _is_alike(*pair):
                    raise ValueError(f"{path}: what enters of an image depends on the others")
                layout = torch.channels_last if is_channels_last(pair[0]) else torch.contiguous_format
                self._inputs.append(_Input(number, pair[0].dtype, layout))
            elif _is_same(*pair):
                self._shared[number] = pair[0]
            else:
                raise ValueError(f"{path}: an input depends on the number of images")
        if not self._inputs:
            raise ValueError(f"{path}: no input depends on the images")
        self._fed: tuple[torch.Tensor, ...] = ()

    @property
    def bypassed_modules(self) -> list[nn.Module]:
        """The outermost modules that a forward pass from the split point on doesn't compute."""
        return [self._model.get_submodule(name) for name in self._answers]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all weights, buffers, modules and code in front of the split point, when first asked for."""
        return hash_modules(self._front)

    @cached_property
    def architecture(self) -> str:
        """The same without the values of weights and buffers."""
        return hash_architecture(self._front)

    @contextmanager
    def reached(self, receive: Callable[[tuple[torch.Tensor, ...]], None]) -> Iterator[None]:
        """Receive what enters the module in forward passes, tensors with one row per image, (B, ...)."""

        def pick(arguments: Any) -> None:
            leaves = pytree.tree_leaves(arguments)
            receive(tuple(leaves[each.number] for each in self._inputs))

        with _entered(self._module, pick):
            yield

    def feed(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """Choose what enters the module in the next forward pass, (B, ...); returns pixels to call it with."""
        self._fed = tuple(activations)
        shape = (len(self._fed[0]), *self._image_shape)
        return torch.zeros((), device=self._fed[0].device).expand(shape)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Let forward passes start at the split point, from what was fed; of the pixels only the number counts."""
        with ExitStack() as undo:
            for name in self._answers:
                undo.enter_context(other_forward(self._model.get_submodule(name), partial(self._answer, name)))
            undo.enter_context(other_forward(self._module, partial(self._enter, self._module.forward)))
            yield
        self._fed = ()

    def _entering(self, pixels: torch.Tensor) -> Any:
        found: list[Any] = []

        def note(arguments: Any) -> None:
            found.append(arguments)
            raise _Reached

        with _entered(self._module, note), torch.no_grad(), suppress(_Reached):
            self._model(pixel_values=pixels)
        return found[0]

    def _enter(self, forward: Any, *_: Any, **__: Any) -> Any:
        leaves, casts = list(self._shared), torch.is_autocast_enabled(self._fed[0].device.type)
        for each, tensor in zip(self._inputs, self._fed, strict=True):
            dtype = tensor.dtype if casts else each.dtype  # which differ where replay.dtype keeps fewer bits
            leaves[each.number] = tensor.to(dtype).contiguous(memory_format=each.memory_format)
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return forward(*args, **kwargs)

    def _answer(self, name: str, *_: Any, **__: Any) -> Any:
        def placeholder(leaf: Any) -> Any:
            return leaf.placeholder(len(self._fed[0]), self._fed[0].device) if isinstance(leaf, Shape) else leaf

        return pytree.tree_map(placeholder, self._answers[name])


class Prefix(nn.Module):
    """The network in front of some split points: images, or what enters an earlier one -> what enters each."""

    def __init__(self, model: nn.Module, split_points: Sequence[SplitPoint], start: SplitPoint | None = None) -> None:
        """Choose where it ends, in forward order, and where it begins: at the pixels when `start` is None."""
        super().__init__()
        self.model = model
        self._split_points = tuple(split_points)
        self._start = start

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Pixels (B, C, H, W), or the tensors that enter the start -> those that enter each split point, (B, ...)."""
        found: dict[SplitPoint, tuple[torch.Tensor, ...]] = {}

        def note(split_point: SplitPoint, tensors: tuple[torch.Tensor, ...]) -> None:
            found[split_point] = tensors
            if split_point is self._split_points[-1]:
                raise _Reached

        pixels = inputs[0]
        with ExitStack() as undo:
            if self._start is not None:
                undo.enter_context(self._start.bypassed())
                pixels = self._start.feed(inputs)
            for split_point in self._split_points:
                undo.enter_context(split_point.reached(partial(note, split_point)))
            with suppress(_Reached):
                self.model(pixel_values=pixels)
        return tuple(tensor for split_point in self._split_points for tensor in found[split_point])


def find_split_point(model: nn.Module, pixels: torch.Tensor, batchnorm: str = "eval") -> SplitPoint | None:
    """The last split point in front of everything that trains; None where nothing can be computed in advance.

    Args:
        model: The classifier as `prepare_phase` left it. Gradients, modes, buffers and the random state stay.
        pixels: An image as the network takes it, (1, C, H, W), where the model is; its shape counts.
        batchnorm: The phase's.
    """
    pixels = _noise(pixels)
    with left_as_it_was(model):
        calls = trace(model.eval(), pixels)
        owners = {name.rpartition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
        first = min(calls[_called(owner, calls)].entered for owner in owners)
        paths = [path for path, call in calls.items() if path and call.times == 1 and call.entered <= first]
        for path in sorted(paths, key=lambda path: -calls[path].entered)[:_TRIES]:
            try:
                split_point = SplitPoint(model.eval(), path, calls, pixels)
            except ValueError:
                continue
            if _is_clean(model, split_point, pixels, batchnorm):
                return split_point
    return None


def split_point_at(model: nn.Module, path: str, pixels: torch.Tensor) -> SplitPoint:
    """The split point at a path where `find_split_point` has found one in another copy of the network."""
    pixels = _noise(pixels)
    with left_as_it_was(model):
        return SplitPoint(model, path, trace(model.eval(), pixels), pixels)


@contextmanager
def _entered(module: nn.Module, receive: Callable[[Any], None]) -> Iterator[None]:
    """Receive the arguments of a module, (args, kwargs), in forward passes."""
    handle = module.register_forward_pre_hook(lambda _, *arguments: receive(arguments), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _noise(pixels: torch.Tensor) -> torch.Tensor:
    """Two images of the same shape, (2, C, H, W), that no part of a network takes for the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, *pixels.shape[1:]), generator=generator).to(pixels)


def _is_same(two: Any, three: Any) -> bool:
    if isinstance(two, torch.Tensor):
        return two.shape == three.shape and torch.equal(two, three)
    return type(two) is type(three) and bool(two == three)


def _is_alike(two: torch.Tensor, three: torch.Tensor) -> bool:
    """Whether two images make the same rows, up to rounding, with and without a third one."""
    rows = three[: len(two)]
    if not two.is_floating_point():
        return torch.equal(two, rows)
    finite = two[two.isfinite()].float()
    limit = _ROUNDING * float(finite.square().mean().nan_to_num().sqrt())
    return torch.allclose(rows, two, rtol=_ROUNDING, atol=limit, equal_nan=True)


def _front_and_behind(
    model: nn.Module, calls: Mapping[str, Call], entered: int
) -> tuple[dict[str, nn.Module], list[torch.Tensor]]:
    """Modules in front of a split point by path, and the tensors that belong to none of them.

    A module that isn't called counts as the nearest one around it that is: its weights may be read all the same.
    """
    front: dict[str, nn.Module] = {}
    behind: dict[int, torch.Tensor] = {}
    adapted = "base_model.model" in calls
    for path, module in model.named_modules(remove_duplicate=False):
        if calls[_called(path, calls)].entered >= entered:
            behind |= {id(tensor): tensor for _, tensor in own_tensors(module)}
        elif not adapted or f"{path}.".startswith(PEFT_PREFIX):  # around it is PEFT alone
            front[path] = module
    for module in front.values():
        for _, tensor in own_tensors(module):
            behind.pop(id(tensor), None)
    return front, list(behind.values())


def _skippable(calls: Mapping[str, Call], entered: int) -> list[str]:
    """The outermost modules that had run to their end by then, once."""
    over = {path for path, call in calls.items() if call.left < entered}
    return [path for path in over if calls[path].times == 1 and not any(path.startswith(f"{p}.") for p in over)]


def _called(path: str, calls: Mapping[str, Call]) -> str:
    """The nearest module around, itself included, that is called: an adapter's weights may lie in one that isn't."""
    while path not in calls:
        path = path.rpartition(".")[0]
    return path


def _is_clean(model: Any, split_point: SplitPoint, pixels: torch.Tensor, batchnorm: str) -> bool:
    """Whether the network, set up to train, has the same logits and all its gradients without its front part."""
    model.eval()  # as when activations are recorded
    with torch.no_grad(), hidden(split_point.behind):
        activations = Prefix(model, [split_point])(pixels)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    set_modes(model, batchnorm)
    device = pixels.device
    with without_zeros(trainable, device), random_state_kept(device), torch.enable_grad():
        seed_random(device, 0)
        whole = model(pixel_values=pixels).logits.detach()  # (2, K)
        drawn = random_states(device)
        seed_random(device, 0)
        with split_point.bypassed():
            replayed = model(pixel_values=split_point.feed(activations)).logits  # (2, K)
            if not all(map(torch.equal, drawn, random_states(device))):  # dropout or drop path in front of it
                return False
            # Inside, as gradient checkpointing computes a stage again from its entry, which is in front.
            gradients = torch.autograd.grad(replayed.sum(), trainable, allow_unused=True)
    if any(gradient is None or not gradient.isfinite().all() for gradient in gradients):
        return False
    return float((whole - replayed.detach()).abs().max()) <= _TOLERANCE * float(whole.abs().max())
