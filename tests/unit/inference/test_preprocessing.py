import re

import numpy as np
import pytest
import tiny
import transformers
from PIL import Image

from hfft.data.images.resize_mode import fit_processor
from hfft.data.images.transforms import evaluation_transform
from hfft.inference.onnx_predict import open_picture, preprocess
from hfft.inference.preprocessing import plan_preprocessing, preprocessing_steps
from hfft.model.checkpoint import reopen
from hfft.recipe.spec import DataSpec

SQUARE = {"height": 24, "width": 24}
PROCESSORS = {
    "exact": lambda: tiny.processor(24),
    "bicubic": lambda: transformers.BeitImageProcessor(size=SQUARE, do_center_crop=False, resample=3),
    "larger, then crop": lambda: transformers.DeiTImageProcessor(size={"height": 30, "width": 28}, crop_size=SQUARE),
    "shorter edge, then crop": lambda: transformers.BitImageProcessor(size={"shortest_edge": 29}, crop_size=SQUARE),
    "part of the edge": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.8),
    "LeViT's part": lambda: transformers.LevitImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
    "blue first": lambda: transformers.MobileViTImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
    "no scale": lambda: transformers.ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False),
    "timm": lambda: transformers.TimmWrapperImageProcessor(
        pretrained_cfg={
            "input_size": [3, 24, 24],
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.25, 0.3],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        },
        architecture="resnet10t",
    ),
}


def smooth(height, width):
    """An image as photos are: neighboring pixels are alike; each color differs."""
    coarse = np.random.default_rng(height).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_description_makes_the_pixels_that_the_evaluation_has(name):
    processor = PROCESSORS[name]()
    transform = evaluation_transform(processor)
    steps = preprocessing_steps(processor, transform)
    assert steps is not None
    for height, width in ((57, 83), (84, 49), (24, 24), (19, 22)):
        image = smooth(height, width)
        expected = transform(image)
        level = float(expected.max() - expected.min()) / 255
        assert np.abs(preprocess(image, steps) - expected.numpy()).max() <= 2.5 * level


@pytest.mark.parametrize(
    "processor",
    [
        transformers.PerceiverImageProcessor(
            size=SQUARE, crop_size={"height": 40, "width": 40}
        ),  # crops, then resizes
        transformers.ViTImageProcessor(size={"shortest_edge": 24, "longest_edge": 40}),  # keeps the shape
    ],
)
def test_what_can_not_be_described_is_not(processor):
    assert preprocessing_steps(processor, evaluation_transform(processor)) is None


def test_a_picture_is_upright_and_has_eight_bits(tmp_path):
    photo = smooth(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_picture(tmp_path / "turned.png"), photo)
    Image.fromarray(np.full((3, 4), 257 * 77, np.uint16)).save(tmp_path / "deep.png")
    assert np.array_equal(open_picture(tmp_path / "deep.png"), np.full((3, 4, 3), 77))
    Image.fromarray(np.full((3, 4), 77 / 255, np.float32)).save(tmp_path / "float.tiff")
    assert np.array_equal(open_picture(tmp_path / "float.tiff"), np.full((3, 4, 3), 77))


@pytest.mark.parametrize(
    ("kind", "words", "opens_in_js"),
    [
        ("plain", [], True),
        ("letterbox", ["no predict.py: .*letterbox", "transformers.js .*letterbox"], False),
        ("background", ["know no background"], True),
        ("timm", ["transformers.js .*timm_wrapper"], False),
    ],
)
def test_what_others_have_to_do_without(kind, words, opens_in_js, tmp_path):
    model, processor = reopen(tiny.save(tmp_path / "net", "timm_wrapper" if kind == "timm" else "vit", 3))
    changes = {"letterbox": {"fit": "letterbox"}, "background": {"background": (10, 200, 90)}}.get(kind)
    if changes is not None:
        processor = fit_processor(processor, model.config, DataSpec(source="photos", **changes))
    found = plan_preprocessing(model.config, processor, evaluation_transform(processor))
    assert len(found.missing) == len(words)
    assert all(re.search(word, line) for word, line in zip(words, found.missing, strict=True))
    assert (found.opens_in_js, found.steps is None) == (opens_in_js, kind == "letterbox")
