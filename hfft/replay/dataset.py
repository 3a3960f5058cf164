"""A phase's images as recorded activations, and the batches of a network that starts from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from hfft.data.images.batches import FILLER, ignored_like, stack_labels, without_fillers
from hfft.replay.split_point import SplitPoint
from hfft.replay.store import Recording


class ActivationDataset(Dataset[dict[str, Any]]):
    """The activations of a split instead of its images; epochs take turns with the views."""

    def __init__(self, views: Sequence[Recording], labels: Sequence[Any]) -> None:
        """Wrap recordings with one row per image, one for each view; labels are class indices or rows of shares."""
        self.epoch = 0
        self.labels = labels
        self.views = views

    def __len__(self) -> int:
        """Images in the split."""
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the view."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The `activations` of one image and its `label`; FILLER is the first image, counting for nothing."""
        if index == FILLER:
            return {**self[0], "label": ignored_like(self.labels[0])}
        return {"activations": self.views[self.epoch % len(self.views)][index], "label": self.labels[index]}


@dataclass(frozen=True)
class ReplayedData:
    """A phase's data as activations, and the split point at which its network takes them."""

    split_point: SplitPoint
    train: ActivationDataset
    validation: ActivationDataset | None

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack examples without fillers: `activations`, tensors (B, ...); `labels` (B,) or (B, K); no pixels."""
        examples = without_fillers(examples)
        leaves = zip(*(example["activations"] for example in examples), strict=True)
        return {
            "pixel_values": torch.empty(len(examples), 0),
            "activations": tuple(torch.stack(leaf) for leaf in leaves),
            "labels": stack_labels(examples),
        }

    def feed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hand a batch's activations to the split point; returns what the network is called with."""
        others = {name: value for name, value in inputs.items() if name != "activations"}
        return {**others, "pixel_values": self.split_point.feed(inputs["activations"])}
