"""Every recipe of the repository is planned against a checkpoint with the real config; nobody reads its weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    Dinov2Config,
    MobileNetV2Config,
    MobileNetV2ImageProcessor,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)

from hfft.commands.plan import plan_recipe
from hfft.recipe.loading import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
CELLS = {"train/functional": 20, "train/defective": 20, "validation/functional": 4, "validation/defective": 4}
VIT_BLOCK = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
VIT_HEAD = 768 * 2 + 2
CONVNEXT_BLOCK = 768 * 49 + 768 + 2 * 768 + 2 * 768 * 3072 + 3072 + 768 + 768
DINO_BLOCK = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384 + 2 * 384


def timm_cells():
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=1000)
    config.pretrained_cfg = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875}
    return config, None


def dinov2_small():
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    return config, BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})


# recipe: stand-in, and per phase what trains in words and how many parameters
EXPECTED = {
    "convnext_t": (
        lambda: (ConvNextConfig(), ConvNextImageProcessor(size={"shortest_edge": 224})),
        [
            ("head", 768 * 2 + 2),
            # the last stage: three blocks, downsampling (LayerNorm, 2 x 2 convolution); the final norm; the head
            ("blocks 15-17 of 18, norm, head", 3 * CONVNEXT_BLOCK + 768 + 4 * 384 * 768 + 768 + 2 * 768 + 768 * 2 + 2),
        ],
    ),
    "dinov2_s": (
        dinov2_small,
        [
            ("head", 768 * 2 + 2),
            ("blocks 10-11 of 12, norm, head", 2 * DINO_BLOCK + 2 * 384 + 768 * 2 + 2),
        ],
    ),
    "mobilenet_v2_lesson": (
        lambda: (MobileNetV2Config(num_labels=1001), MobileNetV2ImageProcessor()),
        [
            ("head", 1280 * 2 + 2),
            # 20 layers, from the end: the last convolution and its norm, then three blocks of six
            (
                "blocks 13-15 of 16, norm, head",
                (320 * 1280 + 2 * 1280)
                + sum(
                    960 * i + 2 * 960 + 9 * 960 + 2 * 960 + 960 * o + 2 * o
                    for i, o in ((160, 160), (160, 160), (160, 320))
                )
                + 1280 * 2
                + 2,
            ),
        ],
    ),
    "quickstart": (timm_cells, [("head", 1280 * 2 + 2), None]),
    "vit_b16": (
        lambda: (ViTConfig(), ViTImageProcessor()),
        [("head", VIT_HEAD), ("blocks 8-11 of 12, norm, head", 4 * VIT_BLOCK + 2 * 768 + VIT_HEAD)],
    ),
    "vit_b16_lora": (
        lambda: (ViTConfig(), ViTImageProcessor()),
        [("head", VIT_HEAD), ("adapter in blocks 0-11 of 12, head", 12 * 4 * 8 * (768 + 768) + VIT_HEAD)],
    ),
}


def test_no_recipe_is_left_out():
    assert [path.stem for path in RECIPES] == sorted(EXPECTED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_is_planned(path, photos, tmp_path):
    build, expected = EXPECTED[path.stem]
    config, processor = build()
    config.save_pretrained(tmp_path / "checkpoint")
    save_file({"unread": torch.zeros(1)}, tmp_path / "checkpoint" / "model.safetensors")
    if processor is not None:
        processor.save_pretrained(tmp_path / "checkpoint")
    overrides = [
        f"model.checkpoint={tmp_path / 'checkpoint'}",
        f"data.source={photos(CELLS)}",
        f"output_dir={tmp_path}",
        "data.splits={}",
    ]
    recipe = load_recipe(path, overrides)
    _, plans = plan_recipe(recipe)
    for plan, wanted in zip(plans, expected, strict=True):
        if wanted is not None:
            assert (plan.trains, plan.trainable) == wanted
    rates = [max(group.learning_rate for group in plan.groups) for plan in plans]
    assert plans[0].trains == "head"
    assert rates[1] < rates[0]
    assert not (tmp_path / recipe.name).exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert load_recipe(path).name == path.stem
    assert f"hfft train recipes/{path.name}" in text or f"scripts/{path.stem}.sh" in text
