"""Labels of images, from model.onnx: python predict.py IMAGE ...

`hfft export` writes this file next to onnx/model.onnx, whose metadata hold labels and preprocessing. It needs numpy,
Pillow and onnxruntime, and nothing else. With simplejpeg, a JPEG that lacks a part is refused instead of filled with
gray; with pillow-heif, HEIC is read.
"""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from hfft.data.images.modes import open_picture
from hfft.system.text import printable


class Model:
    """model.onnx with its labels and its preprocessing."""

    def __init__(self, folder: str | Path) -> None:
        """Open onnx/model.onnx in a folder."""
        file = Path(folder) / "onnx" / "model.onnx"
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.labels: list[str] = json.loads(metadata["labels"])
        self.steps: dict[str, Any] = json.loads(metadata["preprocessing"])
        # Of a multi-label model: the probability from which each label is given.
        self.thresholds: dict[str, float] | None = json.loads(metadata.get("thresholds", "null"))

    def __call__(self, *files: str | Path) -> list[dict[str, float]]:
        """Label to probability for each image, the most probable first.

        Raises:
            ValueError: If one can't be read; the message begins with its name.
        """
        return [self.label(file) for file in files]  # one at a time, so that many need no more memory than one

    def label(self, file: str | Path) -> dict[str, float]:
        """Label to probability for one image, the most probable first.

        Raises:
            ValueError: If it can't be read; the message begins with its name.
        """
        try:
            pixels = preprocess(open_picture(file, self.steps.get("background")), self.steps)  # (3, H, W)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        logits = np.asarray(self.session.run(["logits"], {"pixel_values": pixels[np.newaxis]})[0])[0]  # (K,)
        if self.thresholds is not None:
            shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
        else:
            powers = np.exp(logits - logits.max())
            shares = powers / powers.sum()
        return {self.labels[k]: float(shares[k]) for k in np.argsort(-shares, kind="stable")}

    def answer(self, shares: Mapping[str, float]) -> dict[str, float]:
        """The most probable label, or of a multi-label model all that reach their thresholds."""
        if self.thresholds is not None:
            return {label: share for label, share in shares.items() if share >= self.thresholds[label]}
        return dict(list(shares.items())[:1])


def preprocess(image: Image.Image, steps: Mapping[str, Any]) -> np.ndarray:
    """Resize, crop the middle and scale.

    Args:
        image: RGB.
        steps: Content of `preprocessing` in the metadata: `resize`, [height, width] or the length of the shorter edge,
            and `resample`, a filter of Pillow; `crop`, [height, width], and `crop_rounding`, of half a pixel:
            `even` or `down`; `channels`, which color each channel shows; `mean` and `std` of pixels from 0 to 1.

    Returns:
        (3, H, W) float32.
    """
    width, height = image.size
    if isinstance(steps["resize"], int):
        short, long = steps["resize"], int(steps["resize"] * max(image.size) / min(image.size))
        width, height = (short, long) if width <= height else (long, short)
    else:
        height, width = steps["resize"]
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[steps["resample"].upper()])
    crop_height, crop_width = steps["crop"]
    rounded = round if steps["crop_rounding"] == "even" else int
    top, left = rounded((height - crop_height) / 2), rounded((width - crop_width) / 2)
    pixels = np.asarray(image)[top : top + crop_height, left : left + crop_width, steps["channels"]]  # (H, W, 3)
    scaled = (pixels / np.float32(255) - np.float32(steps["mean"])) / np.float32(steps["std"])
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)  # (3, H, W)


def print_labels(files: Sequence[str]) -> int:
    """Print a line for each label of each image; images that can't be read are named on standard error.

    Returns:
        The exit status: 1 where an image couldn't be read, 2 where none was given or the model can't be opened.
    """
    if not files or files[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if files else sys.stderr)
        return 0 if files else 2
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")  # a console of any encoding
    try:
        model = Model(Path(__file__).parent)
    except Exception as error:  # onnxruntime has no base class of its own
        print(printable(f"onnx/model.onnx can't be opened: {error}"), file=sys.stderr)
        return 2
    status = 0
    for file in files:
        try:
            found = model.label(file)
        except ValueError as error:
            print(printable(str(error)), file=sys.stderr)
            status = 1
            continue
        for label, probability in model.answer(found).items() or [("none", float("nan"))]:
            print(f"{printable(file)}\t{printable(label)}\t{probability:.4f}")
    return status


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends where nobody reads on, as in `predict.py ... | head`
    sys.exit(print_labels(sys.argv[1:]))
