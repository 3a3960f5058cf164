"""Whether all that a phase trains gets a gradient and moves, looked at in its first optimizer steps."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hfft.errors import TrainingError
from hfft.model.anatomy import PEFT_PREFIX
from hfft.runs.record import Group

_STEPS = 8  # before a tensor that hasn't moved is looked at: LoRA's A and what is behind a head of zeros start late
_FEWEST = 4  # of a shorter phase, before what had no gradient is taken for a fault
_MORE = 4  # steps in which it is looked at
_ENTRIES = 64  # of a tensor, that are compared first
_SHOWN = 3

_LOG = get_logger(__name__)


class FirstSteps(TrainerCallback):
    """Compares what trains with what it was when the phase began; ends a phase that can't train what it says.

    A step counts if the optimizer took it, at a rate above 0. It costs a few numbers of each tensor, once; only
    tensors of which none of these has changed are looked at whole.
    """

    def __init__(self, title: str, groups: Sequence[Group]) -> None:
        """Choose what the log calls the phase.

        Args:
            title: For example `phase 1/2 head`.
            groups: Of the plan: the names of what trains, by part.
        """
        self._title = title
        self._parts = {name: group.part for group in groups for name in group.names}
        self._steps = 0
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._had_gradient: set[str] = set()
        self._watched: dict[str, torch.Tensor] = {}  # whole copies
        self._nonzero: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a few numbers of each tensor, or of this process's part of it, which FSDP now and then hides."""
        self._steps, self._watched, self._had_gradient = 0, {}, set()
        found = {name.removeprefix("module."): value for name, value in kwargs["model"].named_parameters()}
        self._parameters = {name: found[name] for name in self._parts if name in found}
        self._before = {name: _some(value) for name, value in self._trained().items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has taken a step, and the gradients are still there."""
        if not self._before or not _counts(kwargs.get("optimizer")):
            return
        trained = self._trained()
        self._steps += 1
        self._had_gradient |= {name for name, value in trained.items() if value.grad is not None}
        for name in self._watched:
            gradient = self._parameters[name].grad
            if gradient is not None:
                self._nonzero[name] = self._nonzero[name] | _local(gradient).any()
        if self._steps == _STEPS:
            still = self._still(args, trained)
            self._check_gradients(args, trained, still)
            self._watch(trained, still)
        elif self._steps == _STEPS + _MORE:
            self._tell(args, kwargs.get("optimizer"))
            self._before, self._watched = {}, {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A phase of few steps ends: only what had no gradient at all is a fault."""
        if self._before and _FEWEST <= self._steps < _STEPS:
            trained = self._trained()
            self._check_gradients(args, trained, self._still(args, trained))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What trains, by the plan's names; a user's callback may have frozen some of it."""
        return {name: value for name, value in self._parameters.items() if value.requires_grad}

    def _still(self, args: Any, trained: dict[str, Any]) -> list[str]:
        """Names of the tensors of which no number that was taken has changed, in any process."""
        names = [name for name in trained if name in self._before]
        changed = [(_some(trained[name]) != self._before[name]).any() for name in names]
        return [name for name, moved in zip(names, _together(args, changed), strict=True) if not moved]

    def _check_gradients(self, args: Any, trained: dict[str, Any], still: list[str]) -> None:
        """Raise where tensors that didn't move had no gradient, unless the optimizer takes all gradients away."""
        flags = [*(name in self._had_gradient for name in still), bool(self._had_gradient)]
        *had, any_had = _together(args, [torch.tensor(flag) for flag in flags])
        lacking = [name for name, one in zip(still, had, strict=True) if any_had and not one]
        if lacking:
            raise TrainingError(
                f"{self._title}: {len(lacking)} of {len(trained)} tensors that should train got no gradient in "
                f"{self._steps} steps and stay as they are, such as {_listed(lacking)}. Something in the recipe, in a "
                "callback or in the network's own code cuts their gradient off"
            )

    def _watch(self, trained: dict[str, Any], still: list[str]) -> None:
        self._watched = {name: _local(trained[name].detach()).clone() for name in still}
        self._nonzero = {name: torch.zeros((), dtype=torch.bool, device=v.device) for name, v in self._watched.items()}

    def _tell(self, args: Any, optimizer: Any) -> None:
        """Say of the tensors that didn't move in the last steps either why not."""
        trained = self._trained()
        names = [name for name in self._watched if name in trained]
        moved = _together(args, [(_local(trained[name].detach()) != self._watched[name]).any() for name in names])
        pulled = _together(args, [self._nonzero[name] for name in names])
        groups = getattr(optimizer, "param_groups", ())
        rates = {id(p): group.get("lr") for group in groups for p in group["params"]}
        resting = [
            (name, pull)
            for name, has_moved, pull in zip(names, moved, pulled, strict=True)
            if not has_moved and rates.get(id(trained[name])) != 0
        ]
        too_small = [name for name, pull in resting if pull]
        zero = [name for name, pull in resting if not pull]
        if too_small:
            say = _LOG.warning if 2 * len(too_small) > len(trained) else _LOG.info
            say(
                f"{self._title}: {len(too_small)} of {len(trained)} tensors have a gradient and don't move, such as "
                f"{_listed(too_small)}: each step is lost in the rounding of {trained[too_small[0]].dtype}; is the "
                "learning rate too small?"
            )
        alive = {self._parts[name] for name in trained if name not in zero}
        parts = sorted({self._parts[name] for name in zero} - alive)
        if parts:
            _LOG.warning(
                f"{self._title}: {', '.join(parts)}: nothing is trained there, as every gradient was exactly zero in "
                f"the first {self._steps} steps"
            )
        elif zero:
            _LOG.info(
                f"{self._title}: {len(zero)} of {len(trained)} tensors have gradients of exactly zero and don't move, "
                f"such as {_listed(zero)}"
            )


def _counts(optimizer: Any) -> bool:
    """Whether an optimizer took the step, at a rate above 0; loss scaling skips steps, a warm-up begins at 0."""
    if getattr(optimizer, "step_was_skipped", False):
        return False
    rates = [group.get("lr") for group in getattr(optimizer, "param_groups", ())]
    return not rates or any(rate is None or rate > 0 for rate in rates)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Copies of a few of a tensor's numbers, evenly spread; of this process's part of it."""
    flat = _local(tensor.detach()).reshape(-1)
    return flat[:: max(1, len(flat) // _ENTRIES)].clone()


def _together(args: Any, flags: Sequence[torch.Tensor]) -> list[bool]:
    """Of each flag, whether it is set in any process; for all processes together."""
    if not flags:
        return []
    found = torch.stack([flag.to(args.device, torch.float32) for flag in flags])
    if args.world_size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.removeprefix(PEFT_PREFIX) for name in names[:_SHOWN])
