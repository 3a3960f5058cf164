"""`data.augment`: its presets and keys."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from hfft.recipe.values import STRICT, Crop

# light: 128 of 160 pixels in each direction, https://hf.co/papers/1912.11370 (BiT-HyperRule). standard: the crops of
# fastai's train_imagenette.py. strong: what is added to that in torchvision's recipe for ResNet-50 (references, 2021).
_LIGHT = {"crop": (0.64, 1.0), "flip": True}
_STANDARD = {"crop": (0.35, 1.0), "flip": True, "trivialaugment": True}
PRESETS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "light": _LIGHT,
    "standard": _STANDARD,
    "strong": {**_STANDARD, "erasing": 0.1, "mixup": 0.2, "cutmix": 1.0},
}
"""What `data.augment` may be called, and the keys that each name stands for."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AugmentSpec:
    """Random changes of training images; none by default.

    A preset (`PRESETS`) stands for the section, `augment: standard`, or for the keys that it doesn't hold itself,
    `{preset: standard, flip: both}`. A recipe that is read back holds the keys and not the preset's name.

    Attributes:
        crop: Range of the cropped share of an image's area (torchvision's RandomResizedCrop), or null for the
            evaluation's own resize and crop.
        flip: `true` or `horizontal`, `vertical`, `both`, or `false`.
        rotate90: Turns by 0, 90, 180 or 270 degrees; for images that look alike whichever side is up.
        randaugment: Magnitude (0 to 30) of two RandAugment operations, https://hf.co/papers/1909.13719.
        trivialaugment: One operation of random strength (TrivialAugment Wide), https://hf.co/papers/2103.10158.
        augmix: Severity (1 to 10) of AugMix, https://hf.co/papers/1912.02781.
        color: Brightness, contrast and saturation change by a factor of 1 - color to 1 + color; 0 is off.
        erasing: Probability that a rectangle is erased, https://hf.co/papers/1708.04896.
        mixup: Alpha of mixup, https://hf.co/papers/1710.09412; 0 is off.
        cutmix: Alpha of CutMix, https://hf.co/papers/1905.04899; 0 is off. With mixup, each batch takes one of both.
    """

    crop: Crop | None = None
    flip: bool | Literal["horizontal", "vertical", "both"] = False
    rotate90: bool = False
    randaugment: Annotated[int, Field(ge=0, le=30)] | None = None
    trivialaugment: bool = False
    augmix: Annotated[int, Field(ge=1, le=10)] | None = None
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """The keys of a preset, below those that are given."""
        keys: Any = {"preset": given} if isinstance(given, str) else getattr(given, "kwargs", given)
        if not isinstance(keys, dict) or "preset" not in keys:
            return given
        name, own = keys["preset"], {key: value for key, value in keys.items() if key != "preset"}
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"allowed: keys with values, or a preset: {', '.join(PRESETS)}")
        return {**PRESETS[name], **own}

    @property
    def mixing(self) -> tuple[str, ...]:
        """Of mixup and cutmix, which mix the pixels of several images, those that are on."""
        return tuple(name for name in ("mixup", "cutmix") if getattr(self, name) > 0)
