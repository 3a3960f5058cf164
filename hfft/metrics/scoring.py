"""A model and splits -> predictions, metrics with intervals, and a table by class."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import Transform
from hfft.data.sources.labels import is_multi_label
from hfft.errors import DataError
from hfft.metrics.probabilities import softmax
from hfft.metrics.scores import Scores, measured
from hfft.metrics.thresholds import kept_thresholds
from hfft.system.progress import SOON, bar

_MANY = 16  # batches; fewer don't repay the preparation of something faster

Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Pixels (B, C, H, W) -> tensors (B, ...)."""


def score(
    model: Any,
    splits: Mapping[str, Dataset],
    transform: Transform,
    *,
    classes: Sequence[str],
    batch_size: int = 32,
    workers: int = 0,
) -> dict[str, Scores]:
    """Predict every image once, whatever the number of processes, and measure each split.

    Args:
        model: A classifier; one for any number of labels may keep thresholds in its config.
        splits: Rows by split name, with columns `image`, `label` and `file`.
        transform: The evaluation transform.
        classes: Class names.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.

    Returns:
        By split name, the same on every process.

    Raises:
        DataError: If an image can't be decoded.
    """
    if not splits:
        return {}
    examples = Examples(concatenate_datasets(list(splits.values())), transform.pixels)
    logits = predict(model, examples, transform.floats, batch_size=batch_size, workers=workers)
    by_themselves = is_multi_label(examples.rows)
    thresholds = kept_thresholds(model.config, len(classes)) if by_themselves else None
    values = divided(logits if by_themselves else softmax(logits), splits)
    return {split: measured(values[split], rows, classes, thresholds) for split, rows in splits.items()}


def divided(values: np.ndarray, splits: Mapping[str, Dataset]) -> dict[str, np.ndarray]:
    """Values (N, ...) of all images, one split after the other, by split."""
    parts = np.split(values, list(accumulate(map(len, splits.values())))[:-1])
    return dict(zip(splits, parts, strict=True))


def predict(
    model: Any,
    examples: Examples,
    floats: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    workers: int = 0,
) -> np.ndarray:
    """Logits (N, K) of all examples, in their order, gathered from all processes.

    Args:
        model: A classifier.
        examples: Images.
        floats: Pixels of a batch to what the model takes.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
    """
    return compute(Logits(model), examples, floats, batch_size=batch_size, workers=workers)[0]


def compute(
    network: nn.Module,
    examples: Examples,
    floats: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    workers: int = 0,
    choose_run: Callable[[nn.Module, torch.Tensor], Run] | None = None,
    then: Callable[..., Sequence[torch.Tensor]] | None = None,
) -> list[np.ndarray]:
    """What a network makes of all examples, in their order, gathered from all processes.

    Args:
        network: Pixels (B, C, H, W) -> a flat tuple of tensors (B, ...).
        examples: Images.
        floats: Pixels of a batch to what the network takes.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
        choose_run: The network and its first batch -> what computes the same, faster; not asked where there are too
            few images to repay its preparation.
        then: Makes the tensors that are returned from the network's, in eager torch.

    Returns:
        For each tensor an array, (N, ...) float32.
    """
    accelerator = Accelerator()
    loader = accelerator.prepare_data_loader(DataLoader(examples, batch_size, collate_fn=_batch, num_workers=workers))
    network = network.to(accelerator.device).eval()
    run: Run = network
    batches: list[list[torch.Tensor]] = []
    with torch.no_grad(), _broken_images_named():
        for pixels in bar("scoring", len(loader), loader, unit="batches", delay=SOON):
            batch = floats(pixels)
            if choose_run is not None and not batches and len(examples) >= _MANY * batch_size:
                run = choose_run(network, batch)
            found: Sequence[torch.Tensor] = run(batch)
            found = found if then is None else then(*found)
            gathered: Any = accelerator.gather_for_metrics([tensor.float().contiguous() for tensor in found])
            batches.append([tensor.cpu() for tensor in gathered])  # each (B, ...)
    return [torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True)]


@contextmanager
def _broken_images_named() -> Iterator[None]:
    """What a worker raised comes with its traceback in the message, of which the last line is the message."""
    try:
        yield
    except DataError as error:
        _, _, message = str(error).strip().rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
        raise DataError(message) from error


class Logits(nn.Module):
    """A classifier with a flat tuple as output: its logits (B, K)."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap the classifier."""
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of pixels (B, C, H, W)."""
        return (self.model(pixel_values=pixels).logits,)


def _batch(examples: Sequence[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([example["pixel_values"] for example in examples])  # (B, C, H, W)
