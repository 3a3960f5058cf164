"""The training loss, normalised by images: one big batch, accumulated ones and many processes give one gradient."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from hfft.data.sources.reading import ImageData
from hfft.errors import RecipeError
from hfft.recipe.contradictions import multi_label_problems
from hfft.recipe.spec import Recipe


class ImageLoss:
    """Cross entropy from the model's logits, as `compute_loss_func` of transformers.Trainer.

    The Trainer passes the number of label entries over all micro-batches and processes of an optimizer step; the sum
    over a micro-batch divided by that number makes accumulated gradients those of one big batch. Models' own losses
    are not used: many of them ignore that number (transformers issue 47688).
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        *,
        gamma: float = 0.0,
        shifts: Sequence[float] | None = None,
    ) -> None:
        """Choose smoothing, weights and form.

        Args:
            label_smoothing: Share of the target spread evenly over all classes.
            class_weights: Factor of each class, (K,). The sum is divided by the number of images and not, as in
                PyTorch, by the sum of their weights, which differs from one micro-batch to the next.
            gamma: Of the focal loss (https://hf.co/papers/1708.02002); 0 is cross entropy.
            shifts: Added to the logits, (K,); from `prior_shifts`.
        """
        self.gamma = gamma
        self.shifts = None if shifts is None else torch.tensor(shifts)
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: With `logits`, (B, K).
            labels: (B,) class indices, or (B, K) shares of the classes, whose sum is the image's weight, or for
                LabelSetLoss 0 and 1; -100 counts for nothing.
            num_items_in_batch: Label entries of the whole optimizer step; None for the mean over this batch.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits  # (B, K)
        entries_per_image = labels.numel() // len(labels)
        if labels.is_floating_point():  # of -100 as a share, cross entropy knows nothing
            counted = labels[:, 0] >= 0
            logits, labels = logits[counted], labels[counted]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # The constants stay where the logits are: a copy in each step would wait for all that is computed before.
        self.shifts = None if self.shifts is None else self.shifts.to(logits)
        self.class_weights = None if self.class_weights is None else self.class_weights.to(logits)
        if self.shifts is not None:
            logits = logits + self.shifts
        total = self._sum(logits, labels)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch / entries_per_image)

    def _sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over images of logits (B, K) and labels (B,) or (B, K)."""
        weight = self.class_weights
        smoothing = self.label_smoothing
        if not labels.is_floating_point():
            if self.gamma == 0:
                return functional.cross_entropy(
                    logits, labels, weight=weight, reduction="sum", label_smoothing=smoothing
                )
            counted = labels >= 0
            logits, labels = logits[counted], functional.one_hot(labels[counted], logits.shape[1]).to(logits.dtype)
        if smoothing > 0:  # of an image's whole weight
            labels = (1 - smoothing) * labels + smoothing / logits.shape[1] * labels.sum(dim=1, keepdim=True)
        if self.gamma == 0:
            return functional.cross_entropy(logits, labels, weight=weight, reduction="sum")
        logs = functional.log_softmax(logits, dim=1)  # (B, K)
        terms = labels * _focus(1 - logs.exp(), self.gamma) * -logs
        return (terms if weight is None else terms * weight).sum()


class LabelSetLoss(ImageLoss):
    """Binary cross entropy of each label by itself, for images with any number of labels.

    The mean over the classes, normalised by images as ImageLoss is. Smoothing moves a target of 0 or 1 halfway to 1/2
    where it is 1; mixed targets between them are taken as they are. Class weights multiply the term of an image that
    has the label (`pos_weight` of torch's BCEWithLogitsLoss); the focal loss counts each label less that is predicted
    well already.
    """

    def _sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over images of the mean over classes, of logits (B, K) and labels (B, K) from 0 to 1."""
        smoothing = self.label_smoothing
        targets = labels.to(logits) * (1 - smoothing) + smoothing / 2
        weight = self.class_weights
        if self.gamma == 0:
            terms = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
            return terms.sum() / logits.shape[1]
        shares = logits.sigmoid()
        has = targets * _focus(1 - shares, self.gamma) * -functional.logsigmoid(logits)
        lacks = (1 - targets) * _focus(shares, self.gamma) * -functional.logsigmoid(-logits)
        return ((has if weight is None else has * weight) + lacks).sum() / logits.shape[1]


def _focus(misses: torch.Tensor, gamma: float) -> torch.Tensor:
    """What the focal loss weighs answers by: how far each probability misses, to the power of gamma.

    Below 1, the power has no slope at 0, which float32 rounds sure answers to: they count as if they missed by the
    least that it tells from 0.
    """
    return misses.clamp(min=torch.finfo(misses.dtype).eps) ** gamma if gamma < 1 else misses**gamma


def prior_shifts(counts: Sequence[int], tau: float) -> tuple[float, ...]:
    """What logit adjustment adds to the logits in training, (K,): tau times the log of each class's share.

    Without it at prediction, rare classes are as likely as frequent ones. Source: https://hf.co/papers/2007.07314.
    """
    return tuple(tau * math.log(count / sum(counts)) for count in counts)


def loss_for(recipe: Recipe, images: ImageData) -> Callable[[float], ImageLoss]:
    """Label smoothing to the loss that the recipe asks for.

    Raises:
        RecipeError: If the recipe is none for images with any number of labels, and as `class_weights`.
    """
    spec = recipe.loss
    if images.is_multi_label and (problems := multi_label_problems(recipe)):
        raise RecipeError("\n".join(["the images have any number of labels (data.task):", *problems]))
    gamma = (spec.gamma or 2.0) if spec.name == "focal" else 0.0
    weights = class_weights(recipe, images)
    if images.is_multi_label:
        return partial(LabelSetLoss, class_weights=weights, gamma=gamma)
    shifts = None
    if spec.name == "logit_adjusted":
        shifts = prior_shifts(list(images.counts("train").values()), spec.tau or 1.0)
    return partial(ImageLoss, class_weights=weights, gamma=gamma, shifts=shifts)


def class_weights(recipe: Recipe, images: ImageData) -> tuple[float, ...] | None:
    """Factors of the classes in the loss, (K,); balanced ones have a mean of 1 over the training images.

    Multi-label, they multiply the terms of images that have a label; balanced ones are how many images lack it for
    each that has it.

    Raises:
        RecipeError: If the recipe names other classes than the images have, or all images have a label that is to be
            balanced.
    """
    weights = recipe.class_weights
    if weights is None:
        return None
    if weights == "balanced":
        counts, total = images.counts("train"), len(images.splits["train"])
        if not images.is_multi_label:
            return tuple(total / (len(counts) * count) for count in counts.values())
        everywhere = [label for label, count in counts.items() if count == total]
        if everywhere:
            raise RecipeError(
                f"class_weights: balanced: all training images have the label {', '.join(everywhere)}; give numbers "
                "by class, or leave it out"
            )
        return tuple((total - count) / count for count in counts.values())
    if set(weights) != set(images.labels):
        raise RecipeError(f"class_weights: found {', '.join(weights)}; the classes are {', '.join(images.labels)}")
    return tuple(weights[label] for label in images.labels)
