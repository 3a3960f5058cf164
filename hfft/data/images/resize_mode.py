"""A processor that squashes or letterboxes images instead of cropping them, and knows their background."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional
from transformers import ViTImageProcessor
from transformers.image_utils import SizeDict, pil_torch_interpolation_mapping

from hfft.data.images.augmentation import as_rgb_tensor
from hfft.data.images.decoding import Decoded
from hfft.data.images.transforms import PixelScale, makes_same, noise, pixel_scale, processed
from hfft.errors import ModelError
from hfft.recipe.spec import DataSpec

_TIMM_MODES = {"squash": "squash", "letterbox": "border"}
_TRIED = ((64, 80), (90, 40))  # height and width of the images that any processor is tried on
_SHAPES = ((90, 40, 3), (40, 90, 3), (64, 64, 3), (20, 31, 3))  # of the images that a fit is tried on


def fit_processor(processor: Any, config: Any, spec: DataSpec) -> Any:
    """A processor with the recipe's resize mode and background, in settings that are saved with the model.

    The mode is written in transformers' own settings, so that its pipelines do the same: a size of height and width
    for `squash`; for `letterbox` a largest height and width, and a center crop, which adds black bars; `crop_mode` for
    timm's processors, in the config, which is changed. `background` is a setting of ours, which only hfft reads.

    Raises:
        ModelError: If the processor can't do it, or does something else instead; if it can't take images of any shape,
            or makes tensors of different shapes of them, which are no batch.
    """
    fit = None if spec.fit == "checkpoint" else spec.fit
    if fit is not None or spec.background is not None:
        if config.model_type == "timm_wrapper":
            processor = _fit_timm(processor, config, fit, spec.background)
        else:
            processor = copy.deepcopy(processor) if fit is None else _fitted(processor, fit)
            if spec.background is not None:
                processor.background = list(spec.background)
    check_processor(processor)
    return processor


def _fitted(processor: Any, fit: str) -> Any:
    name, scale = type(processor).__name__, pixel_scale(processor)
    if processed(processor, noise((300, 300, 3))).shape[1:] != (scale.height, scale.width):
        raise ModelError(
            f"data.fit: {name} leaves images as large as they are; set in the checkpoint's preprocessor_config.json "
            "do_resize: true and a size of height and width"
        )
    for found in _candidates(processor, fit, scale):
        shown = partial(_shown, fit=fit, scale=scale, interpolation=_interpolation(found))
        if makes_same(found, shown, scale, _SHAPES, tolerance=1e-2):
            found.fit = fit
            return found
    raise ModelError(f"data.fit: {name} can't {fit} images; leave data.fit out")


def check_processor(processor: Any) -> None:
    """Refuse a processor that makes of images what is no batch; a ModelError as of `try_processor`, too."""
    made = try_processor(processor)
    if len(set(made)) > 1:
        pairs = zip(made, _TRIED, strict=True)
        seen = " and ".join(f"{shape} of {width} x {height} pixels" for shape, (height, width) in pairs)
        raise ModelError(
            f"model.checkpoint: its image processor, {type(processor).__name__}, makes {seen}; a batch needs images "
            "of one size: set data.fit to squash or letterbox, or a size of height and width in its "
            "preprocessor_config.json"
        )


def try_processor(processor: Any) -> list[tuple[int, ...]]:
    """What a processor makes of images of two shapes: (C, H, W) of each.

    Raises:
        ModelError: If it can't take them, or makes no images of finite numbers.
    """
    what, made = f"model.checkpoint: its image processor, {type(processor).__name__}, makes", []
    for shape in _TRIED:
        pixels = processed(processor, noise((*shape, 3)))
        if pixels.ndim != 3:
            raise ModelError(
                f"{what} {tuple(pixels.shape)} of an image, not channels, height and width; take a checkpoint of an "
                "image classifier"
            )
        if not pixels.isfinite().all():
            raise ModelError(
                f"{what} values that are not finite numbers; mend image_std and rescale_factor in its "
                "preprocessor_config.json"
            )
        made.append(tuple(pixels.shape))
    return made


def copy_fit(config: Any, other: Any) -> None:
    """Copy what `fit_processor` wrote into a config to another one, which is saved with the model."""
    if config.model_type == "timm_wrapper":
        other.pretrained_cfg = config.pretrained_cfg


def _fit_timm(processor: Any, config: Any, fit: str | None, background: tuple[int, ...] | None) -> Any:
    settings = dict(config.pretrained_cfg)
    if fit is not None:
        settings |= {"crop_mode": _TIMM_MODES[fit], "crop_pct": 1.0, "fit": fit}
    if background is not None:
        settings["background"] = list(background)
    config.pretrained_cfg = settings
    changed = type(processor)(settings, config.architecture)
    for key in {"fit", "background"} & set(settings):  # as `load_processor` does when the model is opened again
        setattr(changed, key, settings[key])
    return changed


def _candidates(processor: Any, fit: str, scale: PixelScale) -> Iterator[Any]:
    """The processor with other sizes; else the plainest of all with its scale: ConvNeXT's crops whatever is said."""
    exact = {"height": scale.height, "width": scale.width}
    if fit == "squash":
        settings: dict[str, Any] = {"size": exact, "do_center_crop": False}
    else:
        size = {"max_height": scale.height, "max_width": scale.width}
        settings = {"size": size, "do_center_crop": True, "crop_size": exact}
    changed = copy.deepcopy(processor)
    for key, value in {"do_resize": True, **settings}.items():
        setattr(changed, key, SizeDict(**value) if isinstance(value, dict) else value)
    yield changed
    if scale.channels == (0, 1, 2) and hasattr(processor, "resample"):
        spread = (scale.white - scale.black).flatten()  # (C,), in units of the standard deviation
        mean = (-scale.black.flatten() / spread).tolist()
        yield ViTImageProcessor(
            do_resize=True, image_mean=mean, image_std=(1 / spread).tolist(), resample=processor.resample, **settings
        )


def _interpolation(processor: Any) -> Any:
    name = processor.resample
    resample = Image.Resampling[name.upper()] if isinstance(name, str) else Image.Resampling(name)
    return pil_torch_interpolation_mapping[resample]


def _shown(image: Decoded, fit: str, scale: PixelScale, interpolation: Any) -> torch.Tensor:
    """An image as it should come out, (3, H, W) uint8."""
    pixels, size = as_rgb_tensor(image).contiguous(), [scale.height, scale.width]
    height, width = pixels.shape[-2:]
    inner = size
    if fit == "letterbox":
        share = min(scale.height / height, scale.width / width)
        inner = [int(height * share), int(width * share)]
    resized = functional.resize(pixels, inner, interpolation=interpolation, antialias=True)
    return functional.center_crop(resized, size)
