"""A phase's images as recorded activations, and the batches that a network takes that starts from them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hfft.data.images.batches import FILLER, ignored_like, stack_labels, without_fillers
from hfft.replay.recordings import Recording
from hfft.replay.split_point import SplitPoint, placeholder_pixels


class ActivationDataset(Dataset[dict[str, Any]]):
    """The activations of a split in the place of its images; epochs take turns with the views."""

    def __init__(self, views: Sequence[Recording], labels: Sequence[Any]) -> None:
        """Wrap the recordings.

        Args:
            views: One recording per view, with one row per image.
            labels: Of the images: class indices, or rows of shares.
        """
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


class ReplayedData:
    """A phase's data as activations, and the split point at which its network takes them."""

    def __init__(
        self,
        split_point: SplitPoint,
        train: ActivationDataset,
        validation: ActivationDataset | None,
        shape: Sequence[int],
    ) -> None:
        """Put them together.

        Args:
            split_point: Where the network starts.
            train: Training images.
            validation: Validation images, if there are any.
            shape: Of an image as the network takes it, (C, H, W).
        """
        self.split_point = split_point
        self.train = train
        self.validation = validation
        self._shape = tuple(shape)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack examples: `activations`, tensors (B, ...); `labels` (B,) or (B, K); and no pixels, (B, 0).

        Fillers are left out, but for one where there is nothing else.
        """
        examples = without_fillers(examples)
        leaves = zip(*(example["activations"] for example in examples), strict=True)
        return {
            "pixel_values": torch.empty(len(examples), 0),
            "activations": tuple(torch.stack(leaf) for leaf in leaves),
            "labels": stack_labels(examples),
        }

    def feed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hand a batch's activations to the split point; returns what the network is called with."""
        inputs = dict(inputs)
        activations = inputs.pop("activations")
        self.split_point.feed(activations)
        shape = (len(activations[0]), *self._shape)
        return {**inputs, "pixel_values": placeholder_pixels(shape, activations[0].device)}
