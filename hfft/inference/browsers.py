"""What transformers.js needs of an exported folder, and what it lacks of a model."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import ViTImageProcessor

from hfft.data.images.transforms import Transform, evaluation_transform
from hfft.system.files import read_json, write_json

# What version 4.3 has for image classification: src/models/registry.js and image_processors.js of its package.
_NETWORKS = frozenset(
    (
        *("beit", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers", "efficientnet", "fastvit"),
        *("hiera", "ijepa", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "pvt", "resnet", "segformer"),
        *("swin", "vit", "vit_msn"),
    )
)
_PROCESSORS = frozenset(
    f"{name}ImageProcessor"
    for name in (
        *("Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "MobileNetV1", "MobileNetV2", "MobileViT", "Pvt"),
        *("Segformer", "Siglip", "ViT"),
    )
)
BROWSERS = "transformers.js 4.3"
_NAMED = "transformers.js_config"


def known_processor(processor: Any, transform: Transform, how: dict[str, Any] | None) -> Any:
    """The processor, or a plain one that transformers.js knows, where that makes the same of an image of noise.

    Args:
        processor: Of the model.
        transform: Its evaluation transform.
        how: What it does, from `describe_preprocessing`.
    """
    if _name(processor) in _PROCESSORS or how is None or how["channels"] != [0, 1, 2]:
        return processor
    size = how["resize"]
    plain: Any = ViTImageProcessor(
        size={"shortest_edge": size} if isinstance(size, int) else dict(zip(("height", "width"), size, strict=True)),
        do_center_crop=size != how["crop"],
        crop_size=dict(zip(("height", "width"), how["crop"], strict=True)),
        image_mean=how["mean"],
        image_std=how["std"],
        resample=Image.Resampling[how["resample"].upper()],
    )
    if "background" in how:
        plain.background = how["background"]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8))
    expected, found = transform(noise), evaluation_transform(plain)(noise)
    is_same = found.shape == expected.shape and bool((found - expected).abs().max() < 1e-3)  # of 1/255 / std
    return plain if is_same else processor


def name_precision(config: Path) -> None:
    """Say in a config.json that weights are float32; else transformers.js looks for quantized ones in a browser."""
    write_json(config, {**read_json(config), _NAMED: {"dtype": "fp32"}})


def lacks(config: Any, processor: Any, how: dict[str, Any] | None) -> list[str]:
    """What those who open the folder without hfft have to do themselves, a sentence each.

    Args:
        config: Of the network.
        processor: What is saved.
        how: What it does, from `describe_preprocessing`.
    """
    found = []
    name = _name(processor)
    if how is None:
        found.append(f"no predict.py: it can't do what the image processor, {name}, does{_shape_of(processor)}")
    if config.model_type not in _NETWORKS:
        found.append(f"{BROWSERS} doesn't open it: it knows no {config.model_type} network")
    elif name not in _PROCESSORS:
        found.append(f"{BROWSERS} doesn't open it: it knows no {name}")
    elif how is None:
        found.append(f"{BROWSERS} can't prepare images: it can't do what {name} does{_shape_of(processor)}")
    if how is not None and "background" in how:
        found.append("transformers.js and pipeline() know no background: lay transparent images over it before")
    return found


def _name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Fast")


def _shape_of(processor: Any) -> str:
    is_letterbox = getattr(processor, "fit", None) == "letterbox"
    return " (letterbox: the whole image in its shape, between bars)" if is_letterbox else ""
