"""Make the lesson's data: 100 images of random pixels in 5 classes, 96 x 96, so that its recipe runs anywhere.

    python scripts/prepare_lesson.py [--data-dir data/lesson] [--random-checkpoint FOLDER]

The second option also saves a MobileNetV2 with random weights and its image processor, for a machine without the Hub.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, IMAGES_PER_CLASS, SIDE = 5, 20, 96


def prepare_data(folder: Path) -> None:
    """Write `folder/class_K/NN.png`, the same at every call."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        for number in range(IMAGES_PER_CLASS):
            path = folder / f"class_{label}" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def prepare_random_checkpoint(folder: Path) -> None:
    """Save a MobileNetV2 of the original size with random weights, seeded."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2ImageProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    MobileNetV2ForImageClassification(MobileNetV2Config()).save_pretrained(folder)
    MobileNetV2ImageProcessor().save_pretrained(folder)


def main() -> None:
    """Parse the arguments and make what they ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/lesson"))
    parser.add_argument("--random-checkpoint", type=Path)
    arguments = parser.parse_args()
    prepare_data(arguments.data_dir)
    print(f"{CLASSES * IMAGES_PER_CLASS} images in {CLASSES} classes: {arguments.data_dir}")
    if arguments.random_checkpoint is not None:
        prepare_random_checkpoint(arguments.random_checkpoint)
        print(f"MobileNetV2 with random weights: {arguments.random_checkpoint}")


if __name__ == "__main__":
    main()
