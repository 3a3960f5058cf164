"""An image processor -> numbers that say what it does, for those who run a model without transformers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend

from hfft.data.images.transforms import Transform, background_of, pixel_scale
from hfft.errors import ModelError
from hfft.inference.onnx_predict import prepare

_SIZES = ((375, 500), (601, 333), (333, 333), (90, 121), (31, 40))  # height and width of the images of the check
_MEAN, _LARGEST = 0.05, 3.0  # steps of 255: how far torchvision's 8-bit resize may be from Pillow's
_LEVIT = 256 / 224  # how much larger LeViT's processor resizes than it crops


def describe_preprocessing(processor: Any, transform: Transform) -> dict[str, Any] | None:
    """Resize, crop and scale as `onnx_predict.prepare` takes them.

    What the processor's settings say is believed only where images of noise come out the same.

    Args:
        processor: The image processor.
        transform: Its evaluation transform.

    Returns:
        None where the processor does something else.
    """
    try:
        scale = pixel_scale(processor)
    except ModelError:
        return None
    std = 1 / (scale.white - scale.black)  # (3, 1, 1)
    common = {
        "channels": list(scale.channels),
        "mean": [round(value, 6) for value in (-scale.black * std).flatten().tolist()],
        "std": [round(value, 6) for value in std.flatten().tolist()],
    }
    background = background_of(processor)
    if background is not None:
        common["background"] = list(background)
    for shape in _shapes(processor, scale.height, scale.width):
        how = {**shape, **common}
        if _is_faithful(how, transform, float((scale.white - scale.black).abs().max()) / 255):
            return how
    return None


def _shapes(processor: Any, height: int, width: int) -> Iterator[dict[str, Any]]:
    """What the processor may do to an image's shape, the most likely first."""
    rest = {"resample": _resample(processor), "crop": [height, width]}
    steps = getattr(getattr(processor, "val_transforms", None), "transforms", ())  # timm's
    for size in [step.size for step in steps if type(step).__name__ == "Resize"]:
        yield {"resize": size if isinstance(size, int) else list(size), **rest, "crop_rounding": "even"}
    if isinstance(processor, TorchvisionBackend):
        size, ratio = getattr(processor, "size", None), getattr(processor, "crop_pct", None)
        edges = [size.shortest_edge] if size and size.shortest_edge else []
        edges += [int(edge / ratio) for edge in edges if ratio] + [int(_LEVIT * edge) for edge in edges]
        exact = [[size.height, size.width]] if size and size.height and size.width else []
        for resize in (*exact, *edges, [height, width]):
            yield {"resize": resize, **rest, "crop_rounding": "down"}


def _resample(processor: Any) -> str:
    asked = getattr(processor, "resample", None)
    if asked is None:
        asked = getattr(processor, "data_config", {}).get("interpolation", "bilinear")
    known = {str(filter_.name).lower() for filter_ in Image.Resampling}
    name = asked if isinstance(asked, str) else Image.Resampling(asked).name.lower()
    return name if name in known else "bicubic"


def _is_faithful(how: dict[str, Any], transform: Transform, level: float) -> bool:
    """Whether images of noise come out as the model's evaluation has them; `level` is one step of 255."""
    rng = np.random.default_rng(0)
    for height, width in _SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = transform(image)
        found = torch.from_numpy(prepare(image, how))
        if found.shape != expected.shape:
            return False
        difference = (found - expected).abs() / level
        if difference.mean() > _MEAN or difference.max() > _LARGEST:
            return False
    return True
