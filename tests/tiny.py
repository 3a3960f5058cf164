"""Tiny classifiers built from config with a fixed seed, saved as checkpoints with a processor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

from hfft.model.anatomy import Anatomy, dissect

SIDE = 32

_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 8,
}
_STAGED = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
_WINDOWED = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
}
_TWO_TOWERS = {  # the text tower is not part of the classifier
    "vision_config": _TRANSFORMER,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}
_PYRAMID = {
    "image_size": SIDE,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
_LEVIT = {
    "image_size": SIDE,
    "hidden_sizes": [8, 12, 16],
    "num_attention_heads": [1, 2, 2],
    "depths": [1, 1, 2],
    "key_dim": [4, 4, 4],
}
_PERCEIVER = {
    "num_latents": 8,
    "d_latents": 16,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "image_size": SIDE,
}
# By model type; where a type has several classes, `type+what` is another one.
CONFIGS: dict[str, dict[str, Any]] = {
    "beit": {**_TRANSFORMER, "use_mask_token": False},
    "bit": {**_STAGED, "embedding_size": 8, "num_groups": 4},
    "clip": {**_TWO_TOWERS, "projection_dim": 16},
    "convnext": {**_STAGED, "patch_size": 2},
    "convnextv2": {**_STAGED, "patch_size": 2},
    "cvt": {"embed_dim": [8, 12, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "data2vec-vision": _TRANSFORMER,
    "deit": {**_TRANSFORMER, "architectures": ["DeiTForImageClassification"]},
    "deit+teacher": {**_TRANSFORMER, "architectures": ["DeiTForImageClassificationWithTeacher"]},
    "dinov2": {**_TRANSFORMER, "mlp_ratio": 2},
    "dinov2_with_registers": {**_TRANSFORMER, "mlp_ratio": 2},
    "donut-swin": _WINDOWED,
    "efficientnet": {
        "image_size": SIDE,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "hidden_dim": 320,
        "drop_connect_rate": 0.2,
    },
    "focalnet": {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2, 1]},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 24],
        "depths": [1, 1, 2, 1],
        "stage_in_channels": [8, 8, 12, 16],
        "stage_mid_channels": [4, 4, 6, 8],
        "stage_out_channels": [8, 12, 16, 24],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {"image_size": [SIDE, SIDE], "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "ijepa": _TRANSFORMER,
    "levit": {**_LEVIT, "architectures": ["LevitForImageClassification"]},
    "levit+teacher": {**_LEVIT, "architectures": ["LevitForImageClassificationWithTeacher"]},
    "metaclip_2": {**_TWO_TOWERS, "projection_dim": 16},
    "mobilenet_v1": {"image_size": SIDE, "depth_multiplier": 0.25, "min_depth": 4},
    "mobilenet_v2": {"image_size": SIDE, "depth_multiplier": 0.25, "min_depth": 4},
    "mobilevit": {
        "image_size": SIDE,
        "hidden_sizes": [8, 12, 16],
        "neck_hidden_sizes": [8, 8, 12, 16, 16, 16, 24],
        "num_attention_heads": 2,
    },
    "mobilevitv2": {"image_size": SIDE, "width_multiplier": 0.25, "output_stride": 16},
    "perceiver": {**_PERCEIVER, "architectures": ["PerceiverForImageClassificationLearned"]},
    "perceiver+conv": {**_PERCEIVER, "architectures": ["PerceiverForImageClassificationConvProcessing"]},
    "perceiver+fourier": {**_PERCEIVER, "architectures": ["PerceiverForImageClassificationFourier"]},
    "poolformer": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]},
    "pvt": {**_PYRAMID, "sequence_reduction_ratios": [2, 2, 1, 1]},
    "pvt_v2": {**_PYRAMID, "sr_ratios": [2, 2, 1, 1]},
    "regnet": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "embedding_size": 8, "groups_width": 4},
    "resnet": {**_STAGED, "embedding_size": 8},
    "segformer": {**_PYRAMID, "sr_ratios": [2, 2, 1, 1], "decoder_hidden_size": 16},
    "siglip": _TWO_TOWERS,
    "swiftformer": {"image_size": SIDE, "depths": [1, 1, 2, 1], "embed_dims": [8, 12, 16, 24]},
    "swin": _WINDOWED,
    "swinv2": _WINDOWED,
    "textnet": {
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 12, 16, 24],
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 3], [3, 1]], [[3, 3]]],
        "conv_layer_strides": [[2], [2], [2, 1], [2]],
    },
    "vit": {**_TRANSFORMER, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "vit_msn": _TRANSFORMER,
    "timm_wrapper": {"architecture": "resnet10t"},
}


def build(family: str, classes: int = 2, **changes: Any) -> PreTrainedModel:
    """A tiny model of the family in evaluation mode; equal at each call."""
    model_type = family.partition("+")[0]
    config = AutoConfig.for_model(model_type, **{**CONFIGS[family], "num_labels": classes, **changes})
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # statistics that are not the identity
            if name.endswith("running_mean"):
                buffer.uniform_(-0.1, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


@functools.cache
def anatomy(family: str, **changes: Any) -> Anatomy:
    """The parts of what `build` gives, found once."""
    return dissect(build(family, **changes))


def save(folder: Path, family: str = "vit", classes: int = 10, **changes: Any) -> Path:
    """A checkpoint folder of the family: config, safetensors, processor."""
    model = build(family, classes, **changes)
    if family == "timm_wrapper":
        model.config.pretrained_cfg = {
            "input_size": [3, SIDE, SIDE],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }
    model.save_pretrained(folder)
    if family != "timm_wrapper":
        processor().save_pretrained(folder)
    return folder


def processor(side: int = SIDE) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
