"""How unlike all training images an image is: the distance to its nearest neighbours among their features.

The distance is that to the k-th nearest of some training images, between head inputs of length 1; it is given as the
share of the run's validation images, which the model had not seen either, that are nearer.
Source: https://hf.co/papers/2204.06507.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hfft.data.images.batches import Examples
from hfft.data.sources.labels import label_array, strata_of
from hfft.errors import ModelError
from hfft.evaluators.features import HEAD_INPUT, collect_features, unit_rows
from hfft.evaluators.protocol import Evaluator, Job, Result
from hfft.system.distributed import on_main
from hfft.system.files import write_file

FILE = "novelty.safetensors"
"""Name of the file in a model folder."""
_IMAGES = 2000
_VALIDATION = 1000
_NEIGHBOUR = 10  # of 1,000 or more training images; the hundredth part of fewer


@dataclass(frozen=True)
class Novelty:
    """Features of training images that other images are compared with."""

    features: np.ndarray  # of training images, (M, D), rows of length 1
    distances: np.ndarray  # of the validation images, (V,), ascending

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Share of the validation images that are nearer to the training images: (N, D) -> (N,), from 0 to 1."""
        return np.searchsorted(self.distances, self._distances(features)) / len(self.distances)

    def _distances(self, features: np.ndarray) -> np.ndarray:
        unit = unit_rows(features)
        many = min(_NEIGHBOUR, -(-len(self.features) // 100))
        lengths = np.sum(self.features**2, axis=1)  # about 1, as they are rounded
        squared = 1 + lengths - 2 * unit @ self.features.T  # (N, M)
        return np.sqrt(np.maximum(np.partition(squared, many - 1, axis=1)[:, many - 1], 0))

    @classmethod
    def of(cls, train: np.ndarray, validation: np.ndarray) -> "Novelty":
        """From head inputs of training images (M, D) and validation images (V, D)."""
        kept = unit_rows(train).astype(np.float16).astype(np.float64)  # as they will be read
        return cls(kept, np.sort(cls(kept, np.zeros(0))._distances(validation)))

    @classmethod
    def load(cls, folder: Path) -> "Novelty":
        """Read what `save` wrote into a model's folder.

        Raises:
            ModelError: If it isn't there, or damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise ModelError(f"{folder}: no {FILE}, which a run with `novelty: true` keeps; leave novelty out")
        try:
            tensors = load_file(path)
            return cls(tensors["features"].astype(np.float64), tensors["distances"])
        except (SafetensorError, KeyError) as error:
            raise ModelError(f"{path}: can't be read: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the features into a model's folder, as float16."""
        tensors = {"features": self.features.astype(np.float16), "distances": self.distances}
        write_file(folder / FILE, lambda aside: save_file(tensors, aside))


class OutOfDistribution(Evaluator):
    """Keeps the features of training images with the model, for a run with `novelty: true`."""

    name = "novelty"

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """Write the file into the result's folder; metrics.json gets nothing."""
        on_main(lambda: _find_novelty(job, result).save(result.folder))
        return None


def _find_novelty(job: Job, result: Result) -> Novelty:
    """As many training images of each class as there are, or multi-label of each set of labels."""
    splits, seed, transform = job.images.splits, job.recipe.seed, result.forward.transform
    chosen = {
        "train": choose_balanced(strata_of(label_array(splits["train"])), _IMAGES, seed),
        "validation": np.random.default_rng(seed).permutation(len(splits["validation"]))[:_VALIDATION],
    }
    found = []
    for split, places in chosen.items():
        examples = Examples(splits[split].select(np.sort(places).tolist()), transform.pixels)
        by_part = collect_features(result.model, examples, transform.floats).by_part
        if HEAD_INPUT not in by_part:
            raise ModelError("novelty: what enters the head of this network can't be seen; set novelty: false")
        found.append(by_part[HEAD_INPUT])
    return Novelty.of(*found)


def choose_balanced(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Indices of at most so many images, drawn at random, as evenly from the classes as they have images."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = pd.Series(order).groupby(labels[order]).cumcount()  # of an image in its class
    return order[np.argsort(rank, kind="stable")][:most]
