"""A model and splits -> predictions and scores; and whether a run's folder answers as the network that it trained."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from hfft.errors import DataError, TrainingError
from hfft.metrics.probabilities import softmax
from hfft.metrics.scores import Scores, measured
from hfft.metrics.thresholds import kept_thresholds
from hfft.model.restoring import left_as_it_was
from hfft.system.progress import SOON, bar

_MANY = 16  # batches; fewer don't repay the preparation of something faster
_COMPARED_IMAGES = 4
_LOGITS = 1e-3  # relative to the largest where that is above 1
_LOGITS_ELSEWHERE = 5e-3  # kernels of an accelerator may round to TF32
# By a type that a phase was measured in: how far its validation numbers may be from the folder's, in float32. Of log
# loss absolute, or relative where it is above 1; of accuracy absolute, and one image more.
_TOLERANCES = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.05}
_COMPARED = ("log_loss", "accuracy", "mean_average_precision")  # others are chosen anew for the folder

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
    """Predict every image once, whatever the number of processes, and measure each split; the same on every process.

    A model for any number of labels may keep thresholds in its config.

    Raises:
        DataError: If an image can't be decoded.
    """
    if not splits:
        return {}
    examples = Examples(concatenate_datasets(list(splits.values())), transform.pixels)
    (logits,) = compute(Logits(model), examples, transform.floats, batch_size=batch_size, workers=workers)
    by_themselves = is_multi_label(examples.rows)
    thresholds = kept_thresholds(model.config, len(classes)) if by_themselves else None
    values = divided(logits if by_themselves else softmax(logits), splits)
    return {split: measured(values[split], rows, classes, thresholds) for split, rows in splits.items()}


def divided(values: np.ndarray, splits: Mapping[str, Dataset]) -> dict[str, np.ndarray]:
    """Values (N, ...) of all images, one split after the other, by split."""
    parts = np.split(values, list(accumulate(map(len, splits.values())))[:-1])
    return dict(zip(splits, parts, strict=True))


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
    """What a network makes of all examples, in their order, gathered from all processes: arrays (N, ...) float32.

    Args:
        network: Pixels (B, C, H, W) -> a flat tuple of tensors (B, ...).
        examples: Images.
        floats: Pixels of a batch to what the network takes.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
        choose_run: The network and its first batch -> what computes the same, faster; not asked where there are too
            few images to repay its preparation.
        then: Makes the tensors that are returned from the network's, in eager torch.
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


def check_logits(trained: tuple[Any, Transform], reopened: tuple[Any, Transform], rows: Dataset, where: str) -> float:
    """The largest difference of two logits between the network in memory and that of a folder, on a few images.

    Each network comes with its own evaluation transform; their modes are left as they were.

    Raises:
        TrainingError: If they differ by more than rounding.
    """
    places = np.linspace(0, len(rows) - 1, min(_COMPARED_IMAGES, len(rows))).astype(int).tolist()
    expected, found = (_few_logits(*one, rows.select(places)) for one in (trained, reopened))  # (N, K)
    limit = _LOGITS if trained[0].device.type == "cpu" else _LOGITS_ELSEWHERE
    limit *= max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= limit:  # NaN too
        raise TrainingError(
            f"{where}: reopened, the model isn't the one that was trained: the logits of {len(places)} training "
            f"images are up to {difference:.3g} apart ({limit:.2g} is allowed); its scores were not reported"
        )
    return difference


def _few_logits(network: Any, transform: Transform, rows: Dataset) -> torch.Tensor:
    """(N, K) float32 on the CPU, in evaluation mode."""
    examples = Examples(rows, transform.pixels)
    pixels = _batch([examples[place] for place in range(len(rows))])
    with left_as_it_was(network), torch.no_grad():
        return network.eval()(pixel_values=transform.floats(pixels.to(network.device))).logits.float().cpu()


def check_validation(
    in_training: Mapping[str, float], scores: Scores, *, types: Collection[str], phase: str, where: str
) -> None:
    """Compare a phase's own validation numbers with those of the folder that was written.

    `types` are those that the phase was computed in, and its activations were kept in; `auto` doesn't count.

    Raises:
        TrainingError: If a number is further away than the tolerance; both numbers are in the message.
    """
    gaps = []
    allowed = max(_TOLERANCES[one] for one in _TOLERANCES.keys() & types)
    for name in (name for name in _COMPARED if name in in_training and name in scores.metrics):
        before: float = in_training[name]
        after: Any = scores.metrics[name]["value"]
        limit = allowed * max(1.0, abs(before)) if name == "log_loss" else allowed + 1 / len(scores.labels)
        if not abs(before - after) <= limit:
            gaps.append(f"{name.replace('_', ' ')} {before:.4f}, and {after:.4f} reopened ({limit:.2g} is allowed)")
    if gaps:
        raise TrainingError(
            f"{where}: reopened, the model answers otherwise than {phase} did while it trained. On validation: "
            f"{'; '.join(gaps)}. Nothing was reported; replay.mode=off in a new run tells whether recorded "
            "activations are the cause"
        )
