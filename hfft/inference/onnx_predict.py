"""Labels of images, from model.onnx: python predict.py IMAGE ...

`hfft export` writes this file beside model.onnx. It needs numpy, Pillow and onnxruntime, and nothing else; labels and
preprocessing are in the metadata of model.onnx.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Model:
    """model.onnx with its labels and its preprocessing."""

    def __init__(self, folder: str | Path) -> None:
        """Open model.onnx in a folder."""
        self.session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        self.labels: list[str] = json.loads(facts["labels"])
        self.how: dict[str, Any] = json.loads(facts["preprocessing"])
        # Of a model that gives an image any number of labels: the probability from which each is given.
        self.thresholds: dict[str, float] | None = json.loads(facts.get("thresholds", "null"))

    def __call__(self, *files: str | Path) -> list[dict[str, float]]:
        """Label to probability for each image, the most probable first."""
        pictures = [open_picture(file, self.how.get("background")) for file in files]
        pixels = np.stack([prepare(picture, self.how) for picture in pictures])  # (B, 3, H, W)
        logits = np.asarray(self.session.run(["logits"], {"pixel_values": pixels})[0])  # (B, K)
        if self.thresholds is not None:
            shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
            return [{self.labels[k]: float(row[k]) for k in np.argsort(-row, kind="stable")} for row in shares]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)
        return [{self.labels[k]: float(row[k]) for k in np.argsort(-row, kind="stable")} for row in shares]

    def answer(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Of probabilities the most probable label; all that reach their thresholds where there may be several."""
        if self.thresholds is not None:
            return {label: share for label, share in shares.items() if share >= self.thresholds[label]}
        return dict(list(shares.items())[:1])


def open_picture(file: str | Path, background: Sequence[int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image; 16 bits are divided by 257, as in hfft, and transparent pixels get a background."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode == "F":
        raise ValueError(f"{file}: holds floating-point pixels; allowed: 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.round(np.asarray(image, dtype=np.float64) / 257)  # (H, W)
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if background is not None and image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background[:3], 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")


def prepare(image: Image.Image, how: Mapping[str, Any]) -> np.ndarray:
    """Resize, crop the middle and scale.

    Args:
        image: RGB.
        how: Content of `preprocessing` in the metadata: `resize`, [height, width] or the length of the shorter edge,
            and `resample`, a filter of Pillow; `crop`, [height, width], and `crop_rounding`, of half a pixel:
            `even` or `down`; `channels`, which color each channel shows; `mean` and `std` of pixels from 0 to 1.

    Returns:
        (3, H, W) float32.
    """
    width, height = image.size
    if isinstance(how["resize"], int):
        short, long = how["resize"], int(how["resize"] * max(image.size) / min(image.size))
        width, height = (short, long) if width <= height else (long, short)
    else:
        height, width = how["resize"]
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[how["resample"].upper()])
    crop_height, crop_width = how["crop"]
    rounded = round if how["crop_rounding"] == "even" else int
    top, left = rounded((height - crop_height) / 2), rounded((width - crop_width) / 2)
    pixels = np.asarray(image)[top : top + crop_height, left : left + crop_width, how["channels"]]  # (H, W, 3)
    scaled = (pixels / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)  # (3, H, W)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python predict.py IMAGE ...")
    model = Model(Path(__file__).parent)
    for file, found in zip(sys.argv[1:], model(*sys.argv[1:]), strict=True):
        for label, probability in model.answer(found).items() or [("none", float("nan"))]:
            print(f"{file}\t{label}\t{probability:.4f}")
