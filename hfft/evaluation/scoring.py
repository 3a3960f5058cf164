"""A model and a split -> predictions, metrics with intervals, and a table by class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from hfft.data.batches import Examples
from hfft.data.transforms import Transform
from hfft.evaluation.intervals import with_intervals
from hfft.evaluation.metrics import softmax
from hfft.model.engine import Engine, choose_engine

_MANY = 16  # batches; fewer don't repay the search for an engine


@dataclass(frozen=True)
class Scores:
    """Predictions of a model on a split, and what they are worth.

    Attributes:
        classes: Class names.
        files: Name of each image, (N,).
        labels: Class index of each image, (N,).
        probabilities: (N, K) float32.
        metrics: Metric name to value and the ends of its 95 % bootstrap interval.
        by_class: Class name to precision, recall, F1 and number of images.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    metrics: dict[str, dict[str, float]]
    by_class: dict[str, dict[str, float]]

    def table(self, split: str) -> pd.DataFrame:
        """One row per image, as in predictions.parquet."""
        best = self.probabilities.argmax(axis=1)
        names = np.asarray(self.classes, dtype=object)
        table = pd.DataFrame(
            {
                "split": split,
                "file": self.files,
                "label": names[self.labels],
                "prediction": names[best],
                "probability": self.probabilities.max(axis=1),
            }
        )
        columns = {f"probability {name}": self.probabilities[:, k] for k, name in enumerate(self.classes)}
        return pd.concat([table, pd.DataFrame(columns)], axis=1)


def score(
    model: Any,
    rows: Dataset,
    transform: Transform,
    *,
    classes: Sequence[str],
    batch_size: int = 32,
    workers: int = 0,
    memory: Path | None = None,
) -> Scores:
    """Predict every image of a split once, whatever the number of processes, and measure.

    Args:
        model: A classifier.
        rows: Columns `image`, `label` and `file`.
        transform: The evaluation transform.
        classes: Class names.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
        memory: Where the speed of engines is noted: with it, the fastest one that agrees with torch predicts, if the
            images are many.

    Returns:
        The same on every process.

    Raises:
        DataError: If an image can't be decoded.
    """
    examples = Examples(rows, transform.pixels)
    logits = predict(model, examples, transform.floats, batch_size=batch_size, workers=workers, memory=memory)
    probabilities = softmax(logits)
    labels = np.asarray(rows["label"])
    return Scores(
        classes=tuple(classes),
        files=tuple(rows["file"]),
        labels=labels,
        probabilities=probabilities,
        metrics=with_intervals(probabilities, labels),
        by_class=_by_class(probabilities, labels, classes),
    )


def predict(
    model: Any,
    examples: Examples,
    floats: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    workers: int = 0,
    memory: Path | None = None,
) -> np.ndarray:
    """Logits (N, K) of all examples, in their order, gathered from all processes.

    Args:
        model: A classifier.
        examples: Images.
        floats: Pixels of a batch to what the model takes.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
        memory: As for `score`.
    """
    if len(examples) < _MANY * batch_size:
        memory = None
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(examples, batch_size, collate_fn=_batch, num_workers=workers))
    network = _Logits(model).to(accelerator.device).eval()
    engine: Engine | None = None
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        for pixels in loader:
            batch = floats(pixels)
            lacking = 0 if memory is None else batch_size - len(batch)  # other engines take one size only
            filled = torch.cat([batch, batch[-1:].expand(lacking, *batch.shape[1:])])
            engine = engine or _engine(network, filled, len(examples), memory)
            (found,) = engine.run(filled)
            gathered: Any = accelerator.gather_for_metrics(found[: len(batch)].float())  # (B, K)
            logits.append(gathered.cpu())
    return torch.cat(logits).numpy()


class _Logits(nn.Module):
    """A classifier whose output is a flat tuple, as engines take it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(pixel_values=pixels).logits,)  # (B, K)


def _engine(network: _Logits, pixels: torch.Tensor, images: int, memory: Path | None) -> Engine:
    """Torch without a memory, and where several processes would have to agree."""
    config: Any = network.model.config
    asked = "torch" if memory is None or PartialState().num_processes > 1 else "auto"
    key = f"{config.model_type} to the logits of {config.num_labels} classes"
    return choose_engine(network, pixels, asked=asked, bfloat16=False, images=images, memory=memory, key=key)


def _batch(examples: Sequence[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([example["pixel_values"] for example in examples])  # (B, C, H, W)


def _by_class(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    predicted = probabilities.argmax(axis=1)
    table = {}
    for number, name in enumerate(classes):
        hits = int(np.sum((predicted == number) & (labels == number)))
        images, chosen = int(np.sum(labels == number)), int(np.sum(predicted == number))
        table[name] = {
            "precision": hits / max(chosen, 1),
            "recall": hits / max(images, 1),
            "f1": 2 * hits / max(images + chosen, 1),
            "images": images,
        }
    return table
