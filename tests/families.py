"""Families of networks as parameters of a test: one of each kind in CI, all of them at night.

What is promised of every family is asked of all of `tiny.CONFIGS` each time: parts, freezing, checkpoints, adapters.
"""

import pytest
import tiny

# Plain blocks, stages, windows, BatchNorm, two towers, two heads, latents, timm
KINDS = ("vit", "convnext", "swin", "resnet", "mobilenet_v2", "siglip", "deit+teacher", "perceiver", "timm_wrapper")
ALL_AT_NIGHT = [
    family if family in KINDS else pytest.param(family, marks=pytest.mark.nightly) for family in tiny.CONFIGS
]
