import io
import pickle

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageOps
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from hfft.data.images.decoding import decode_row
from hfft.data.images.transforms import _scale_on, evaluation_transform, pixel_scale, training_transform
from hfft.errors import ModelError
from hfft.recipe.augment import AugmentSpec

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TIMM_CONFIG = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 0.9}
PROCESSORS = {
    "vit": tiny.processor(),
    "wide": ViTImageProcessor(size={"height": 16, "width": 48}, image_mean=MEAN, image_std=STD),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875, image_mean=MEAN, image_std=STD),
    "center crop": BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "no mean": ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "timm": TimmWrapperImageProcessor(pretrained_cfg=TIMM_CONFIG, architecture="resnet10t"),
    "blue first": MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
}


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pillow(content):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


# Transforms


@pytest.fixture(params=sorted(PROCESSORS))
def processor(request):
    return PROCESSORS[request.param]


def photo(side=80):
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (side, side + 20, 3), dtype=np.uint8))


def seeded(transform, image, seed):
    torch.manual_seed(seed)
    return transform(image)


def test_the_evaluation_transform_is_the_processor(processor):
    pixels = evaluation_transform(processor)(photo())
    expected = processor(images=[photo()], return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels[None], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_are_taken_apart(name):
    transform = evaluation_transform(PROCESSORS[name])
    pixels = transform.pixels(photo())
    assert pixels.dtype == torch.uint8
    assert transform.scale is not None
    assert torch.equal(transform.floats(pixels), transform(photo()))
    assert torch.equal(transform.scale(pixels), transform(photo()))


@pytest.mark.parametrize(
    ("size", "kind", "mode"),
    [((80, 100), "JPEG", "RGB"), ((333, 211), "PNG", "L"), ((20, 31), "JPEG", "L"), ((32, 32), "PNG", "RGB")],
    ids=str,
)
def test_a_row_evaluates_to_what_the_processor_makes_of_it(processor, mode, kind, size):
    content = encoded(photo(300).resize(size).convert(mode), kind)
    image = decode_row({"image": {"bytes": content, "path": None}, "label": 0, "file": "x"})
    expected = processor(images=Image.fromarray(pillow(content)), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(evaluation_transform(processor)(image), expected, rtol=0, atol=1e-6)


class Marked(ViTImageProcessor):
    """Changes one value of its output by less than a pixel value."""

    def _preprocess(self, images, *args, **kwargs):
        batch = super()._preprocess(images, *args, **kwargs)
        batch["pixel_values"][0][0, 0, 0] += 1e-3
        return batch


class Demanding(ViTImageProcessor):
    """Its resize takes an argument that nobody else's takes."""

    def resize(self, image, size, resample, corner):
        return image[..., corner : corner + size.height, corner : corner + size.width]

    def _preprocess(self, images, size, resample, **kwargs):
        resized = [self.resize(image, size, resample, corner=0) for image in images]
        return super()._preprocess(resized, size=size, resample=resample, **{**kwargs, "do_resize": False})


@pytest.mark.parametrize("kind", [Marked, Demanding])
def test_a_processor_with_ways_of_its_own_is_used_as_it_is(kind):
    processor = kind(size={"height": 16, "width": 16})
    transform = evaluation_transform(processor)
    assert transform.scale is None
    assert torch.equal(transform(photo()), processor(photo(), return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    "augment",
    [None, AugmentSpec(crop=(0.5, 1.0), flip=True, randaugment=9), AugmentSpec(trivialaugment=True, augmix=2)],
)
def test_a_transform_can_be_sent_to_workers_that_are_started_anew(processor, augment):
    transform = evaluation_transform(processor) if augment is None else training_transform(processor, augment)
    assert torch.equal(seeded(pickle.loads(pickle.dumps(transform)), photo(), 1), seeded(transform, photo(), 1))


def test_the_scale_leaves_floats_alone():
    scale = pixel_scale(PROCESSORS["vit"])
    pixels = torch.rand(2, 3, 32, 32)
    assert scale(pixels) is pixels
    assert scale(torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 3, 3))[1, 2, 0].tolist() == pytest.approx(
        [-1, -0.6, 1], abs=1e-6
    )


def test_values_of_the_evaluation_transform():
    pixels = evaluation_transform(PROCESSORS["vit"])(Image.new("RGB", (50, 40), (0, 51, 255)))
    assert pixels.shape == (3, 32, 32)
    expected = torch.tensor([-1.0, -0.6, 1.0])[:, None, None]
    assert torch.allclose(pixels, expected.expand(3, 32, 32), atol=1e-6)


@pytest.mark.parametrize("augment", [AugmentSpec(), AugmentSpec(mixup=0.4)], ids=["none", "mixup"])
def test_the_training_transform_without_augmentation_is_the_evaluation_transform(augment, processor):
    assert torch.equal(training_transform(processor, augment)(photo()), evaluation_transform(processor)(photo()))


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (13, 130, 240)], ids=str)
def test_a_crop_has_the_size_and_scale_of_the_evaluation(color, processor):
    image = Image.new("RGB", (90, 70), color)
    expected = evaluation_transform(processor)(image)
    pixels = training_transform(processor, AugmentSpec(crop=(0.5, 1.0)))(image)
    assert pixels.shape == expected.shape
    assert pixels.dtype == torch.float32
    middle = expected[:, expected.shape[1] // 2, expected.shape[2] // 2]
    assert torch.allclose(pixels, middle[:, None, None].expand_as(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (0.5, 0.6), (0.9, 1.0)])
def test_a_crop_takes_the_share_that_was_asked_for(low, high):
    across, down = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.stack([across, down, 0 * across], axis=2))
    transform = training_transform(PROCESSORS["no mean"], AugmentSpec(crop=(low, high)))
    shares = []
    for seed in range(20):
        red, green, _ = seeded(transform, image, seed)
        shares.append(float(red.max() - red.min()) * float(green.max() - green.min()))
    slack = 0.08  # the outermost pixels of the small image are means over several of the large one
    assert all(low - slack < share < high + slack for share in shares)
    assert max(shares) - min(shares) > 0.01


@pytest.mark.parametrize("name", ["vit", "timm, whole"])
def test_a_crop_of_everything_is_resized_as_in_evaluation(name):
    whole = TimmWrapperImageProcessor(pretrained_cfg={**TIMM_CONFIG, "crop_pct": 1.0}, architecture="resnet10t")
    processor = {**PROCESSORS, "timm, whole": whole}[name]  # Pillow's bilinear differs from torchvision's
    square = photo().crop((0, 0, 80, 80))
    crop = training_transform(processor, AugmentSpec(crop=(1.0, 1.0)))
    assert torch.equal(crop(square), evaluation_transform(processor)(square))


QUARTERS = Image.fromarray(
    np.kron(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]]), np.ones((32, 32, 1))).astype(np.uint8)
)
FLIPS = {  # where the red quarter ends: row, column
    "stays": (0, 0),
    "left-right": (0, 1),
    "up-down": (1, 0),
    "both": (1, 1),
}


@pytest.mark.parametrize("crop", [None, (0.95, 1.0)], ids=["whole", "crop"])
@pytest.mark.parametrize(
    ("flip", "outcomes"),
    [
        (False, {"stays"}),
        (True, {"stays", "left-right"}),
        ("horizontal", {"stays", "left-right"}),
        ("vertical", {"stays", "up-down"}),
        ("both", {"stays", "left-right", "up-down", "both"}),
    ],
)
@pytest.mark.parametrize("name", ["vit", "timm"])
def test_flips_happen_in_all_directions_that_were_asked_for_and_no_other(name, flip, outcomes, crop):
    transform = training_transform(PROCESSORS[name], AugmentSpec(flip=flip, crop=crop))
    seen = set()
    for seed in range(40):
        pixels = seeded(transform, QUARTERS, seed)
        redness = pixels[0] - pixels[1] - pixels[2]
        corners = {key: redness[5 + row * 21, 5 + column * 21].item() for key, (row, column) in FLIPS.items()}
        seen.add(max(corners, key=lambda key: corners[key]))
    assert seen == outcomes


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_randaugment_changes_the_image_and_keeps_its_size(name):
    transform = training_transform(PROCESSORS[name], AugmentSpec(randaugment=9))
    plain = evaluation_transform(PROCESSORS[name])(photo())
    results = [seeded(transform, photo(), seed) for seed in range(8)]
    assert all(pixels.shape == plain.shape for pixels in results)
    assert sum(not torch.equal(pixels, plain) for pixels in results) >= 4
    assert torch.equal(seeded(transform, photo(), 3), results[3])


EVERYTHING = {"rotate90": True, "trivialaugment": True, "augmix": 3, "color": 0.4, "erasing": 0.5}


@pytest.mark.parametrize("key", EVERYTHING)
@pytest.mark.parametrize("name", ["vit", "timm", "blue first"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_each_change_keeps_size_and_type_and_is_no_change_at_times(name, key, mode):
    image = photo().convert(mode)
    transform = training_transform(PROCESSORS[name], AugmentSpec(**{key: EVERYTHING[key]}))
    plain = evaluation_transform(PROCESSORS[name]).pixels(image)
    results = [seeded(transform.pixels, image, seed) for seed in range(12)]
    assert all((one.shape, one.dtype) == (plain.shape, torch.uint8) for one in results)
    assert sum(not torch.equal(one, plain) for one in results) >= 4
    assert torch.equal(seeded(transform.pixels, image, 3), results[3])


def test_quarter_turns_are_of_all_four_kinds():
    transform = training_transform(PROCESSORS["vit"], AugmentSpec(rotate90=True))
    plain = evaluation_transform(PROCESSORS["vit"]).pixels(photo())
    turns = [torch.rot90(plain, turn, (1, 2)) for turn in range(4)]
    seen = [seeded(transform.pixels, photo(), seed) for seed in range(40)]
    assert {turn for turn, one in enumerate(turns) for other in seen if torch.equal(one, other)} == {0, 1, 2, 3}
    assert all(any(torch.equal(one, other) for one in turns) for other in seen)


def test_quarter_turns_need_square_images():
    with pytest.raises(ModelError, match=r"rotate90.* 16 x 48"):
        training_transform(PROCESSORS["wide"], AugmentSpec(rotate90=True))


@pytest.mark.parametrize("name", ["center crop", "timm", "blue first"])
def test_what_is_erased_becomes_0(name):
    white = Image.new("RGB", (80, 80), "white")
    transform = training_transform(PROCESSORS[name], AugmentSpec(erasing=1.0))
    pixels, plain = seeded(transform, white, 1), evaluation_transform(PROCESSORS[name])(white)
    erased = (pixels != plain).all(dim=0)
    assert 0.01 < erased.float().mean() < 0.4
    assert pixels[:, erased].abs().max() < 0.02  # the mean colour, to half a level


@pytest.mark.parametrize("kind", [Marked, Demanding])
def test_a_processor_that_is_not_taken_apart_gets_changed_images(kind):
    augment = AugmentSpec(flip=True, rotate90=True, trivialaugment=True, color=0.4, erasing=0.5)
    transform = training_transform(kind(size={"height": 16, "width": 16}), augment)
    assert transform.scale is None
    assert seeded(transform, photo(), 1).shape == (3, 16, 16)


def test_bytes_are_the_way_back():
    for name, processor in PROCESSORS.items():
        transform = evaluation_transform(processor)
        assert torch.equal(transform.scale.bytes(transform(photo())), transform.pixels(photo())), name


def test_random_decisions_come_from_torch_alone():
    every = AugmentSpec(crop=(0.3, 1.0), flip="both", randaugment=9, **EVERYTHING)
    transform = training_transform(PROCESSORS["vit"], every)
    first = seeded(transform, photo(), 1)
    np.random.default_rng().random(10)
    assert torch.equal(seeded(transform, photo(), 1), first)
    assert not torch.equal(seeded(transform, photo(), 2), first)


def test_the_scale_of_a_wide_processor():
    scale = pixel_scale(PROCESSORS["wide"])
    assert (scale.height, scale.width) == (16, 48)
    assert scale.black.flatten().tolist() == pytest.approx([-m / s for m, s in zip(MEAN, STD, strict=True)], abs=1e-5)
    assert scale.white.flatten().tolist() == pytest.approx(
        [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], abs=1e-5
    )


def test_a_processor_that_mixes_colors_has_no_scale():
    class Gray(ViTImageProcessor):
        def _preprocess(self, images, *args, **kwargs):
            return super()._preprocess([images[0].float().mean(0, keepdim=True).expand(3, -1, -1)], *args, **kwargs)

    processor = Gray(size={"height": 16, "width": 16})
    with pytest.raises(ModelError, match=r"^Gray mixes colors: leave data.augment.crop out"):
        pixel_scale(processor)
    assert evaluation_transform(processor).scale is None


def test_a_crop_for_a_processor_that_makes_no_images():
    class Patches:
        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(1, 10, 768)}

    with pytest.raises(ModelError, match=r"shape \(10, 768\)"):
        training_transform(Patches(), AugmentSpec(crop=(0.5, 1.0)))


def test_what_pixels_are_scaled_by_is_made_once_for_a_device():
    scale = evaluation_transform(tiny.processor()).scale
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    _scale_on.cache_clear()
    first, second = scale(pixels), scale(pixels)
    assert torch.equal(first, second)
    assert _scale_on.cache_info().misses == 1
    assert scale(pixels.to("meta")).device.type == "meta"
