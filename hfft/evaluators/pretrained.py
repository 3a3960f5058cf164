"""The pretrained network of a run: what enters its head, and the logits of the head phase, of every image.

A result and the pretrained network have the layers in common that no phase trained: those are computed once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hfft.evaluators.protocol import Job, Then
from hfft.metrics.scoring import Logits
from hfft.model.freezing import set_trainable
from hfft.recipe.spec import PhaseSpec
from hfft.replay.replay import TrainingActivations
from hfft.replay.split_point import Prefix, SplitPoint, find_split_point, split_point_at
from hfft.training.plan import prepare_phase
from hfft.training.settings import training_arguments

_WORTH = 0.2  # share of a forward pass; where less is in common, a pass of its own may take a faster engine
_ROWS = 64  # of an activation data set that are computed at once


class LogitsAndEntering(nn.Module):
    """A classifier with a flat tuple as output: logits (B, K), and the tensors that enter a split point, (B, ...)."""

    def __init__(self, model: nn.Module, split_point: SplitPoint) -> None:
        """Wrap the classifier."""
        super().__init__()
        self.model = model
        self._split_point = split_point

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Both, of pixels (B, C, H, W)."""
        found: list[tuple[torch.Tensor, ...]] = []
        with self._split_point.reached(found.append):
            logits = self.model(pixel_values=pixels).logits  # (B, K)
        return (logits, *(tensor for tensors in found for tensor in tensors))


class Reference:
    """The pretrained network, whose head may be that of the head phase."""

    def __init__(self, model: Any, pixels: torch.Tensor) -> None:
        """Find what enters the head of a network on the device, of which only the head is left trainable.

        `pixels` are an image as it takes them, (1, C, H, W), of which the shape counts.
        """
        self.model = prepare_phase(model, PhaseSpec(name="head", unfreeze="head"), pixels).eval()
        self.pixels = pixels
        self._trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.head = find_split_point(self.model, pixels)  # None: what enters it is no function of the image alone

    def joint(self, result: Any) -> tuple[nn.Module, Then] | None:
        """What computes a trained result's logits, this network's logits, and the features, as `compute` takes it.

        None if both have few layers in common.
        """
        common = None if self.head is None else _common_split_point(result, self.model, self._trained, self.pixels)
        if common is None:
            return None
        split_point, start = common

        def then(logits: torch.Tensor, *entering: torch.Tensor) -> Sequence[torch.Tensor]:
            return (logits, *self._continue(start, entering))

        return LogitsAndEntering(result, split_point), then

    def alone(self) -> tuple[nn.Module, Then]:
        """What computes this network's logits and the features, if they are known, as `compute` takes them."""
        if self.head is None:
            return Logits(self.model), lambda logits: (logits,)
        return LogitsAndEntering(self.model, self.head), lambda logits, *entering: (logits, vectors(entering))

    def training_activations(self, job: Job) -> TrainingActivations | None:
        """What the first phase recorded of the training images, if anything."""
        phase, data = job.phases[0], job.data
        if job.replay is None or phase.spec.adapter is not None:
            return None
        split_point = self.head
        if not phase.spec.trains_head_alone:
            network = prepare_phase(self.model, phase.spec)
            split_point = find_split_point(network, self.pixels, phase.spec.batchnorm)
        if split_point is None:
            return None
        arguments = training_arguments(phase.spec, phase.folder, seed=phase.seed, validate=data.validation is not None)
        return job.replay.recorded(data.frozen_pass(self.model, arguments, "baselines"), split_point, phase.folder)

    def features(self, recorded: TrainingActivations, places: Sequence[int]) -> torch.Tensor:
        """Features (M, D) of some of the recorded images."""
        device, found = self.pixels.device, []
        for begin in range(0, len(places), _ROWS):
            entering = recorded.rows.rows(places[begin : begin + _ROWS])
            entering = tuple(tensor.to(device, self.pixels.dtype) for tensor in entering)
            with torch.no_grad():
                found.append(self._vectors(recorded.split_point, entering).cpu())
        return torch.cat(found)

    def _continue(self, start: SplitPoint, entering: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and features, from what enters a split point."""
        assert self.head is not None
        found: list[tuple[torch.Tensor, ...]] = []
        with start.bypassed(), self.head.reached(found.append):
            logits = self.model(pixel_values=start.feed(entering)).logits  # (B, K)
        return logits, vectors(entering if start.path == self.head.path else found[0])

    def _vectors(self, start: SplitPoint, entering: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert self.head is not None
        if start.path == self.head.path:
            return vectors(entering)
        return vectors(Prefix(self.model, [self.head], start).eval()(*entering))


def vectors(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What enters a head as one vector per image, (B, D): means over tokens (B, T, C) and over places (B, C, H, W)."""
    flat = []
    for tensor in tensors:
        if tensor.ndim == 3:
            tensor = tensor.mean(dim=1)
        flat.append(tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor.flatten(1))
    return torch.cat([tensor.float() for tensor in flat], dim=1)


def _common_split_point(
    result: Any, reference: Any, head: set[str], pixels: torch.Tensor
) -> tuple[SplitPoint, SplitPoint] | None:
    """The last split point of both networks in front of all in which they differ; their weights prove it."""
    theirs = reference.state_dict()
    parameters = dict(result.named_parameters())
    differing: set[str] = set()
    for name, value in result.state_dict().items():
        if not torch.equal(value, theirs[name]):
            owner = name.rpartition(".")[0]
            around = {name} & parameters.keys() or {other for other in parameters if other.startswith(f"{owner}.")}
            if not around:  # a buffer that no parameter leads to
                return None
            differing |= around
    set_trainable(result, differing | head)
    split_point = find_split_point(result, pixels)
    set_trainable(result, set())
    if split_point is None:
        return None
    start = split_point_at(reference, split_point.path, pixels)
    is_same = split_point.fingerprint == start.fingerprint
    return (split_point, start) if is_same and _share(result, split_point, pixels) >= _WORTH else None


def _share(model: Any, split_point: SplitPoint, pixels: torch.Tensor) -> float:
    """Share of a forward pass's multiplications that is in front of a split point."""
    before: list[int] = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with split_point.reached(lambda _: before.append(counter.get_total_flops())):
            model(pixel_values=pixels)
        return before[0] / max(counter.get_total_flops(), 1)
