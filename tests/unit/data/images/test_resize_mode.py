import io
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    Pix2StructImageProcessor,
    TimmWrapperImageProcessor,
    VideoMAEImageProcessor,
    ViTImageProcessor,
)
from transformers.image_utils import SizeDict

from hfft.data.images.augmentation import letterbox_color
from hfft.data.images.decoding import decode_row
from hfft.data.images.resize_mode import fit_processor
from hfft.data.images.transforms import evaluation_transform, training_transform
from hfft.errors import ModelError
from hfft.model.config import load_processor
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import DataSpec, ModelSpec

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TIMM = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 0.9}
PROCESSORS = {
    "vit": tiny.processor(),
    "wide": ViTImageProcessor(size={"height": 16, "width": 48}, image_mean=MEAN, image_std=STD),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875, image_mean=MEAN, image_std=STD),
    "center crop": BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "timm": TimmWrapperImageProcessor(pretrained_cfg=TIMM, architecture="resnet10t"),
    "blue first": MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
}


class Config:
    model_type = "other"


class TimmConfig:
    model_type = "timm_wrapper"
    architecture = "resnet10t"

    def __init__(self):
        self.pretrained_cfg = dict(TIMM)


def fitted(name, **settings):
    config = TimmConfig() if name == "timm" else Config()
    return fit_processor(PROCESSORS[name], config, DataSpec(source="x", **settings)), config


def bars(width=120, height=30):
    """Red at the left edge, green at the right one, blue between."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[:, : width // 6] = (255, 0, 0)
    pixels[:, -(width // 6) :] = (0, 255, 0)
    return Image.fromarray(pixels)


def shown(transform, image):
    """What the network sees, (H, W, 3) uint8."""
    return transform.pixels(image).permute(1, 2, 0).numpy()


def reds(pixels):
    return int(((pixels[..., 0] > 200) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)).any(0).sum())


@pytest.mark.parametrize("name", ["center crop", "convnext", "timm"])
def test_without_a_fit_the_edges_are_cut_off(name):
    pixels = shown(evaluation_transform(PROCESSORS[name]), bars())
    assert reds(pixels) == 0


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_squashed_image_shows_all_of_itself(name):
    processor, _ = fitted(name, fit="squash")
    transform = evaluation_transform(processor)
    assert transform.scale is not None
    pixels = shown(transform, bars())
    width = pixels.shape[1]
    assert abs(reds(pixels) - width / 6) <= 1
    assert pixels.min(axis=2).max() < 60  # no bars: every pixel has one of the three colors
    assert (pixels.max(axis=2) > 120).all()


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_letterboxed_image_keeps_its_shape_between_bars(name):
    processor, _ = fitted(name, fit="letterbox")
    transform = evaluation_transform(processor)
    assert transform.scale is not None
    high, wide = transform.scale.height, transform.scale.width
    pixels = shown(transform, bars(60, 60))
    side = min(high, wide)
    top, left = (high - side) // 2, (wide - side) // 2
    inner = pixels[top : top + side, left : left + side]
    assert abs(reds(inner) - side / 6) <= 1
    tall = shown(transform, bars(30, 240))  # 1 to 8
    fill = letterbox_color(processor)
    assert tall[:, 0].tolist() == tall[:, -1].tolist() == [fill] * high
    assert (tall[high // 2, wide // 2] != fill).any()


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_gray_images_come_out_as_colored_ones_of_the_same_levels(name, fit):
    transform = evaluation_transform(fitted(name, fit=fit)[0])
    gray = bars(97, 41).convert("L")
    assert torch.equal(transform(gray), transform(gray.convert("RGB")))


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
@pytest.mark.parametrize("name", ["vit", "convnext", "center crop"])
def test_the_saved_processor_does_the_same_by_itself(name, fit, tmp_path):
    processor, _ = fitted(name, fit=fit, background="white")
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert (again.fit, again.background) == (fit, [255, 255, 255])
    image = bars(97, 41)
    plain = again(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(evaluation_transform(processor)(image), plain, rtol=0, atol=1e-5)
    assert torch.equal(evaluation_transform(again)(image), evaluation_transform(processor)(image))


def test_timm_keeps_the_fit_in_its_config(tmp_path):
    tiny.save(tmp_path, "timm_wrapper")
    spec = ModelSpec(checkpoint=str(tmp_path))
    from hfft.model.config import load_config

    config = load_config(spec, ("a", "b"))
    processor = fit_processor(
        load_processor(spec, config), config, DataSpec(source="x", fit="squash", background="black")
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["crop_mode"] == "squash"
    again = load_processor(spec, load_config(spec, ("a", "b")))
    assert (again.fit, again.background) == ("squash", [0, 0, 0])
    assert torch.equal(evaluation_transform(again)(bars()), evaluation_transform(processor)(bars()))
    plain = AutoImageProcessor.from_pretrained(tmp_path)  # as pipeline() opens it
    assert torch.allclose(
        plain(images=bars(), return_tensors="pt")["pixel_values"][0],
        evaluation_transform(processor)(bars()),
        rtol=0,
        atol=1e-5,
    )


def test_the_processor_that_came_in_is_left_alone():
    before = PROCESSORS["vit"].to_dict()
    fitted("vit", fit="letterbox", background=[1, 2, 3])
    assert PROCESSORS["vit"].to_dict() == before


def test_nothing_asked_is_the_same_processor():
    assert fitted("vit")[0] is PROCESSORS["vit"]


class Stubborn(MobileViTImageProcessor):
    """Takes short sides only, and shows blue first, so that no plain processor can stand in for it."""

    def resize(self, image, size, *args, **options):
        if not size.shortest_edge:
            raise ValueError("shortest_edge only")
        return super().resize(image, size, *args, **options)


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
def test_a_processor_that_can_not(fit):
    stubborn = Stubborn(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    with pytest.raises(ModelError, match=f"data.fit: Stubborn can't {fit}"):
        fit_processor(stubborn, Config(), DataSpec(source="x", fit=fit))


CROPS = AugmentSpec(crop=(0.9, 1.0))


@pytest.mark.parametrize("name", ["vit", "wide", "timm"])
def test_random_crops_of_a_squashed_image_are_squashed(name):
    processor, _ = fitted(name, fit="squash")
    transform = training_transform(processor, CROPS)
    counts = []
    for seed in range(20):
        torch.manual_seed(seed)
        pixels = shown(transform, bars(240, 30))
        counts.append(reds(pixels) / pixels.shape[1])
    assert 0.08 < np.mean(counts) < 0.2  # a sixth, less what the crop cuts off


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_random_crops_of_a_letterboxed_image_have_bars(name):
    processor, _ = fitted(name, fit="letterbox")
    transform = training_transform(processor, CROPS)
    torch.manual_seed(0)
    pixels = shown(transform, bars(120, 30))
    fill = letterbox_color(processor)
    assert pixels[0].tolist() == pixels[-1].tolist() == [fill] * 32


def transparent():
    pixels = np.full((40, 40, 4), 200, np.uint8)
    pixels[..., 3] = 0
    pixels[:20, :, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"image": {"bytes": stream.getvalue(), "path": None}, "label": 0, "file": "x"}


@pytest.mark.parametrize("name", ["vit", "timm", "center crop"])
@pytest.mark.parametrize(
    ("background", "below"), [(None, [200] * 3), ("white", [255] * 3), ([10, 20, 30], [10, 20, 30])], ids=str
)
def test_transparent_pixels_show_the_background(name, background, below):
    processor, _ = fitted(name, background=background)
    for transform in (evaluation_transform(processor), training_transform(processor, AugmentSpec(flip=True))):
        pixels = shown(transform, decode_row(transparent()))
        assert pixels[2, 5].tolist() == [200] * 3
        assert pixels[-2, 5].tolist() == below


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
def test_strips_have_a_pixel_at_least(fit):
    processor, _ = fitted("vit", fit=fit)
    assert evaluation_transform(processor).pixels(Image.new("RGB", (99, 1), "red")).shape == (3, 32, 32)


# Whatever AutoImageProcessor opens is tried before anything else is done

SQUARE = {"height": 24, "width": 24}


@pytest.mark.parametrize("fit", ["checkpoint", "squash"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": {"longest_edge": 24}}, "can't take an image"),
        ({"size": None}, "can't take an image"),
        ({"size": {"height": 24.0, "width": 24.0}}, "can't take an image"),
        ({"image_mean": None}, "can't take an image"),
        ({"image_std": [0.5] * 4}, "can't take an image"),
        ({"rescale_factor": 0}, "can't take an image"),
        ({"resample": 4}, "can't take an image"),
        ({"resample": 6}, "can't take an image"),
    ],
)
def test_a_processor_that_takes_no_image_is_named(changes, told, fit):
    processor = ViTImageProcessor(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for key, value in changes.items():
        setattr(processor, key, SizeDict(**value) if isinstance(value, dict) else value)
    with pytest.raises(ModelError, match=f"^model.checkpoint: its image processor, ViTImageProcessor, {told}"):
        fit_processor(processor, Config(), DataSpec(source="photos", fit=fit))


@pytest.mark.parametrize("size", [{"shortest_edge": 24}, {"max_height": 24, "max_width": 24}])
def test_images_of_different_sizes_are_no_batch_and_fit_is_the_way_out(size):
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with pytest.raises(ModelError, match=r"data.fit to squash or letterbox"):
        fit_processor(processor, Config(), DataSpec(source="photos"))
    for fit in ("squash", "letterbox"):
        fitted = fit_processor(processor, Config(), DataSpec(source="photos", fit=fit))
        shapes = {evaluation_transform(fitted)(Image.new("RGB", size)).shape for size in ((80, 64), (40, 90))}
        assert shapes == {(3, 24, 24)}


def test_a_processor_that_does_not_resize_has_no_size_to_fit_to():
    processor = ViTImageProcessor(do_resize=False)
    with pytest.raises(ModelError, match="do_resize: true"):
        fit_processor(processor, Config(), DataSpec(source="photos", fit="squash"))


@pytest.mark.parametrize("processor", [VideoMAEImageProcessor(), Pix2StructImageProcessor()], ids=["video", "patches"])
def test_what_makes_no_images_is_refused(processor):
    with pytest.raises(ModelError, match=r"^model.checkpoint: its image processor, "):
        fit_processor(processor, Config(), DataSpec(source="photos"))


def test_values_that_are_no_numbers_are_refused():
    processor = ViTImageProcessor(size=SQUARE, image_std=[0.0] * 3)
    with pytest.raises(ModelError, match="image_std"):
        fit_processor(processor, Config(), DataSpec(source="photos"))


def test_resampling_may_be_a_word():
    processor = ViTImageProcessor(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample="bilinear")
    fitted = fit_processor(processor, Config(), DataSpec(source="photos", fit="squash"))
    assert dict(fitted.size) == SQUARE
