"""The training loss, normalised by images: one big batch, accumulated ones and many processes give one gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional


class ImageLoss:
    """Cross entropy from the model's logits, as `compute_loss_func` of transformers.Trainer.

    The Trainer passes the number of label entries over all micro-batches and processes of an optimizer step; the sum
    over a micro-batch divided by that number makes accumulated gradients those of one big batch. Models' own losses
    are not used: many of them ignore that number (transformers issue 47688).
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        """Choose smoothing and weights.

        Args:
            label_smoothing: Share of the target spread evenly over all classes.
            class_weights: Factor of each class, (K,). The weighted sum is divided by the number of images and not, as
                PyTorch does, by the sum of their weights, which would differ from one micro-batch to the next.
        """
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: With `logits`, (B, K).
            labels: (B,) class indices, or (B, K) shares that sum to 1; -100 counts for nothing.
            num_items_in_batch: Label entries of the whole optimizer step; None for the mean over this batch.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits  # (B, K)
        entries_per_image = labels.numel() // len(labels)
        if labels.is_floating_point():  # of -100 as a share, cross entropy knows nothing
            counted = labels[:, 0] >= 0
            logits, labels = logits[counted], labels[counted]
        weight = None if self.class_weights is None else self.class_weights.to(logits.device)
        total = functional.cross_entropy(
            logits.float(), labels, weight=weight, reduction="sum", label_smoothing=self.label_smoothing
        )
        if num_items_in_batch is None:
            return total / len(labels)
        return total / (num_items_in_batch / entries_per_image)
