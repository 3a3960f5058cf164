"""Labels flipped on purpose: how many of them are among the first label issues, and in how many seconds.

    python scripts/benchmark_label_issues.py --digits
    python scripts/benchmark_label_issues.py recipes/quickstart.yaml

The first takes scikit-learn's digits with their 64 pixels as features; the second the training images of a recipe, as
they enter the head of its pretrained checkpoint. With cleanlab installed, its own choice is shown for comparison.
Labels that were wrong before count as misses of precision.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hfft.evaluators.label_issues import find_label_issues, out_of_fold


def read_digits() -> tuple[torch.Tensor, np.ndarray]:
    """Pixels (N, 64) and labels (N,)."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return torch.from_numpy(data.data).float(), data.target.astype(np.int64)


def read_recipe(path: str) -> tuple[torch.Tensor, np.ndarray]:
    """What enters the head (N, D), and labels (N,), of a recipe's training images."""
    from hfft.data.images.batches import Examples
    from hfft.data.images.resize_mode import fit_processor
    from hfft.data.images.transforms import evaluation_transform
    from hfft.data.sources.reading import load_data
    from hfft.evaluators.pretrained import Reference
    from hfft.metrics.scoring import compute
    from hfft.model.checkpoint import load_checkpoint
    from hfft.model.config import load_config, load_processor
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(path)
    images = load_data(recipe.data, recipe.seed)
    config = load_config(recipe.model, images.labels)
    transform = evaluation_transform(fit_processor(load_processor(recipe.model, config), config, recipe.data))
    network = load_checkpoint(recipe.model, images.labels)[0].eval()
    rows = images.splits["train"]
    examples = Examples(rows, transform.pixels)
    both, then = Reference(network, transform.floats(examples[0]["pixel_values"][None])).alone()
    _, features = compute(both, examples, transform.floats, batch_size=32, then=then)
    return torch.from_numpy(features), np.asarray(rows["label"][:], dtype=np.int64)


def flip(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels with a share of them changed to another class at random, and which those are."""
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    changed = np.zeros(len(labels), dtype=bool)
    changed[rng.permutation(len(labels))[: round(share * len(labels))]] = True
    shifts = rng.integers(1, classes, len(labels))
    return np.where(changed, (labels + shifts) % classes, labels), changed


def _cleanlab() -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    try:
        from cleanlab import filter as cleanlab  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return lambda probabilities, labels: cleanlab.find_label_issues(
        labels, probabilities, return_indices_ranked_by="normalized_margin", n_jobs=1
    )


def _row(name: str, chosen: np.ndarray, changed: np.ndarray, seconds: float) -> str:
    first = chosen[: changed.sum()]
    found = int(changed[first].sum())
    precision, recall = found / max(len(first), 1), found / changed.sum()
    whole = changed[chosen].sum()
    return (
        f"{name:10} {changed.sum():7} {len(chosen):6} {precision:10.2f} {recall:7.2f} "
        f"{whole / max(len(chosen), 1):14.2f} {whole / changed.sum():11.2f} {seconds:8.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", help="a recipe whose data and checkpoint are here")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits in its place")
    parser.add_argument("--share", type=float, default=0.05, help="of labels to flip")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    begun = time.monotonic()
    features, truth = read_digits() if arguments.digits else read_recipe(arguments.recipe)
    print(f"{len(truth):,} images, {features.shape[1]:,} features, read in {time.monotonic() - begun:.1f} s")
    print("           flipped issues  of the first: precision recall   of all: precision recall  seconds")
    other = _cleanlab()
    for seed in range(arguments.seeds):
        labels, changed = flip(truth, arguments.share, seed)
        begun = time.monotonic()
        probabilities = out_of_fold(features, labels, classes=int(truth.max()) + 1, seed=seed)
        issues = np.array([issue.row for issue in find_label_issues(probabilities, labels)], dtype=int)
        print(_row(f"seed {seed}", issues, changed, time.monotonic() - begun))
        if other is not None:
            print(_row("  cleanlab", other(probabilities, labels), changed, 0.0))


if __name__ == "__main__":
    main()
