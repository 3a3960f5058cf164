"""An image processor -> its steps as numbers, and as a processor of transformers.js, for models run without hfft."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from hfft.data.images.transforms import Transform, background_of, evaluation_transform, pixel_scale
from hfft.errors import ModelError
from hfft.inference.onnx_predict import preprocess

# What transformers.js 4.3 knows by its source (src/models/registry.js, image_processors.js). Ten networks were tried:
# beit, convnext, deit, dinov2, efficientnet, mobilevit, resnet, segformer, swin, vit.
_JS_NETWORKS = (
    *("beit", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers", "efficientnet", "fastvit", "hiera"),
    *("ijepa", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "pvt", "resnet", "segformer", "swin"),
    *("vit", "vit_msn"),
)
_JS_PROCESSORS = (  # each with ImageProcessor at its end
    *("Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "MobileNetV1", "MobileNetV2", "MobileViT", "Pvt"),
    *("Segformer", "Siglip", "ViT"),
)
_SIZES = ((375, 500), (601, 333), (333, 333), (90, 121), (31, 40))  # (height, width) of the test images
_MEAN, _LARGEST = 0.05, 3.0  # levels of 255: how far torchvision's 8-bit resize may be from Pillow's
_LEVIT = 256 / 224  # LeViT's processor resizes to this multiple of the crop


@dataclass(frozen=True)
class Preprocessing:
    """How others prepare images for an exported network."""

    steps: dict[str, Any] | None  # for `onnx_predict.preprocess`; None where the processor does something else
    processor: Any  # to be saved: the network's own, or one that transformers.js knows and that does the same
    opens_in_js: bool  # whether transformers.js opens the folder
    missing: tuple[str, ...]  # what users of the folder without hfft have to do without, a sentence each


def plan_preprocessing(config: Any, processor: Any, transform: Transform) -> Preprocessing:
    """How others prepare images for the network of a config, given its image processor and evaluation transform."""
    steps = preprocessing_steps(processor, transform)
    saved = _js_processor(processor, transform, steps)
    name, missing = _name(saved), []
    is_letterbox = getattr(saved, "fit", None) == "letterbox"
    shape = " (letterbox: the whole image in its shape, between bars)" if is_letterbox else ""
    if steps is None:
        missing.append(f"no predict.py: it can't do what the image processor, {name}, does{shape}")
    js_problem = None
    if config.model_type not in _JS_NETWORKS:
        js_problem = f"doesn't open it: it knows no {config.model_type} network"
    elif not _is_known_in_js(saved):
        js_problem = f"doesn't open it: it knows no {name}"
    elif steps is None:
        js_problem = f"can't prepare images: it can't do what {name} does{shape}"
    if js_problem is not None:
        missing.append(f"transformers.js 4.3 {js_problem}")
    if steps is not None and "background" in steps:
        missing.append("transformers.js and pipeline() know no background: lay transparent images over it before")
    return Preprocessing(steps, saved, js_problem is None, tuple(missing))


def preprocessing_steps(processor: Any, transform: Transform) -> dict[str, Any] | None:
    """Resize, crop and scale as `onnx_predict.preprocess` takes them, verified on images of noise.

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
    level = float((scale.white - scale.black).abs().max()) / 255
    candidates = ({**shape, **common} for shape in _shapes(processor, scale.height, scale.width))
    return next((steps for steps in candidates if _is_faithful(steps, transform, level)), None)


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


def _is_faithful(steps: dict[str, Any], transform: Transform, level: float) -> bool:
    """Whether images of noise come out as in the evaluation; `level` is one of the 255 steps of a pixel."""
    rng = np.random.default_rng(0)
    for height, width in _SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = transform(image)
        found = torch.from_numpy(preprocess(image, steps))
        if found.shape != expected.shape:
            return False
        difference = (found - expected).abs() / level
        if difference.mean() > _MEAN or difference.max() > _LARGEST:
            return False
    return True


def _js_processor(processor: Any, transform: Transform, steps: dict[str, Any] | None) -> Any:
    """The processor if transformers.js knows it; else a ViT processor if that does the same to noise."""
    if _is_known_in_js(processor) or steps is None or steps["channels"] != [0, 1, 2]:
        return processor
    size = steps["resize"]
    plain: Any = ViTImageProcessor(
        size={"shortest_edge": size} if isinstance(size, int) else dict(zip(("height", "width"), size, strict=True)),
        do_center_crop=size != steps["crop"],
        crop_size=dict(zip(("height", "width"), steps["crop"], strict=True)),
        image_mean=steps["mean"],
        image_std=steps["std"],
        resample=Image.Resampling[steps["resample"].upper()],
    )
    if "background" in steps:
        plain.background = steps["background"]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8))
    expected, found = transform(noise), evaluation_transform(plain)(noise)
    is_same = found.shape == expected.shape and bool((found - expected).abs().max() < 1e-3)  # of 1/255 / std
    return plain if is_same else processor


def _is_known_in_js(processor: Any) -> bool:
    return _name(processor).removesuffix("ImageProcessor") in _JS_PROCESSORS


def _name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Fast")
