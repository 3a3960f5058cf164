"""Make an image folder of scikit-learn's 1,797 handwritten digits, 64 x 64: 60/15/25 train/validation/test, seeded.

    python scripts/prepare_digits.py [--data-dir data/digits]

The second data set of the measurements in docs/performance.md. The digits are those of the UCI repository (CC BY 4.0).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 64


def prepare_digits(folder: Path) -> None:
    """Write `folder/SPLIT/DIGIT/NNNN.png`, the same at every call."""
    digits: Any = load_digits()
    count = len(digits.target)
    for place, number in enumerate(np.random.default_rng(0).permutation(count)):
        split = "train" if place < 0.6 * count else "validation" if place < 0.75 * count else "test"
        path = folder / split / str(digits.target[number]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[number] / 16 * 255).astype(np.uint8)  # (8, 8)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data/digits"))
    prepare_digits(parser.parse_args().data_dir)
