"""Networks of many families as ONNX, run by onnxruntime and compared with torch."""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
import transformers
from PIL import Image
from torch import nn

from hfft.data.images.resize_mode import fit_processor
from hfft.data.images.transforms import evaluation_transform
from hfft.errors import ModelError
from hfft.inference import onnx_export
from hfft.inference.onnx_export import (
    ParityError,
    compare_outputs,
    plan_preprocessing,
    preprocessing_steps,
    write_graph,
)
from hfft.inference.onnx_predict import open_picture, preprocess
from hfft.model.checkpoint import reopen
from hfft.recipe.spec import DataSpec

LOGITS = torch.tensor([[0.5, -0.2, 0.1], [-3.0, 2.0, 1.0]])
SHAPE = (3, tiny.SIDE, tiny.SIDE)
AT_NIGHT = ("resnet", "dinov2", "efficientnet", "timm_wrapper")
FAMILIES = [
    "vit",
    "convnext",
    "swin",
    "mobilenet_v2",
    *(pytest.param(one, marks=pytest.mark.nightly) for one in AT_NIGHT),
]


class Network(nn.Module):
    """A network with a forward pass of its own."""

    def __init__(self, forward):
        super().__init__()
        self.compute = forward

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.compute(pixel_values))


def noise(count):
    return ((f"image {k}", torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))) for k in range(count))


def check(model, file):
    session = onnxruntime.InferenceSession(file)
    return compare_outputs(
        lambda pixels: session.run(["logits"], {"pixel_values": pixels})[0],
        lambda pixels: model(pixel_values=pixels).logits,
        noise(24),
        "noise",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_each_kind_computes_the_same_for_any_number_of_images(family, tmp_path):
    model = tiny.build(family, 3)
    with torch.no_grad():  # logits of tiny networks are tiny, and would agree with anything
        scale = 1 / max(float(model(pixel_values=torch.stack([pixels for _, pixels in noise(4)])).logits.std()), 1e-30)
    larger = Network(lambda pixels: model(pixel_values=pixels).logits * scale)
    larger.inner = model
    write_graph(larger.eval(), SHAPE, tmp_path / "model.onnx", {})
    assert check(larger, tmp_path / "model.onnx").images == 24


def test_the_file_holds_the_metadata_and_the_names_and_nothing_of_this_machine(tmp_path, capfd):
    metadata = {"labels": json.dumps(["Ameise", "Biene", "蜂"], ensure_ascii=False)}
    write_graph(tiny.build("vit", 3), SHAPE, tmp_path / "model.onnx", metadata)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map == metadata
    (put,), (out,) = session.get_inputs(), session.get_outputs()
    assert (put.name, put.type, put.shape) == ("pixel_values", "tensor(float)", ["batch", *SHAPE])
    assert (out.name, out.type, out.shape) == ("logits", "tensor(float)", ["batch", 3])
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    content = (tmp_path / "model.onnx").read_bytes()
    for path in (os.path.dirname(tiny.__file__), os.path.dirname(torch.__file__), os.path.expanduser("~") + "/"):
        assert path.encode() not in content


def test_weights_in_several_layouts_of_memory(tmp_path):
    model = tiny.build("resnet", 3).to(memory_format=torch.channels_last)
    write_graph(model, SHAPE, tmp_path / "model.onnx", {})
    check(model, tmp_path / "model.onnx")


def test_large_weights_lie_beside_the_file_and_move_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MAX_BYTES", 1000)
    model = tiny.build("vit", 3)
    (tmp_path / "aside").mkdir()
    write_graph(model, SHAPE, tmp_path / "aside/model.onnx", {})
    assert sorted(os.listdir(tmp_path / "aside")) == ["model.onnx", "model.onnx.data"]
    (tmp_path / "aside").rename(tmp_path / "there")
    check(model, tmp_path / "there/model.onnx")


def test_a_network_that_decides_by_pixels_is_refused_in_one_line(tmp_path, capfd):
    network = Network(lambda pixels: pixels.mean((2, 3)) * (2 if pixels.sum() > 0 else 1))
    with pytest.raises(ModelError, match=r"torch.onnx can't export this Network network: .*data-dependent") as caught:
        write_graph(network, SHAPE, tmp_path / "model.onnx", {})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == []


def test_a_batch_that_the_exporter_takes_for_a_constant_is_found(tmp_path):
    network = Network(lambda pixels: pixels.mean((2, 3)).reshape(2, 3))
    write_graph(network, SHAPE, tmp_path / "model.onnx", {})  # which the exporter finds nothing wrong with
    network.compute = lambda pixels: pixels.mean((2, 3))
    with pytest.raises(ParityError, match="a batch of 1 images"):
        check(network, tmp_path / "model.onnx")


def reference(pixels):
    """Two kinds of images, told by their only pixel."""
    return LOGITS[pixels.flatten().long()]


def two_kinds(count=9):
    return ((f"image {k}", torch.full((1, 1, 1), float(k % 2))) for k in range(count))


def answers(change=0.0, at=slice(None)):
    def answer(pixels):
        logits = reference(torch.from_numpy(pixels)).numpy().copy()
        logits[at] += change
        return logits

    return answer


def test_equal_programs_agree_on_batches_of_every_size():
    sizes = []

    def counted(pixels):
        sizes.append(len(pixels))
        return answers()(pixels)

    found = compare_outputs(counted, reference, two_kinds(30), "noise")
    assert sizes == [1, 2, 5, 16, 1, 2, 3]
    assert (found.images, found.same_top1, found.largest_difference, found.what) == (30, 30, 0.0, "noise")
    assert found.batch_sizes == (1, 2, 3, 5, 16)


def test_a_small_difference_is_told():
    found = compare_outputs(answers(np.float32(5e-5), np.s_[:, 1]), reference, two_kinds(), "noise")
    assert found.largest_difference == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize("change", [2e-4, 10.0, np.nan, -np.inf])
@pytest.mark.parametrize("at", [np.s_[-1:, 2], np.s_[:, 0]])
def test_a_large_difference_is_an_error_that_names_the_image(change, at):
    with pytest.raises(ParityError, match=r"logits of image \d, in a batch of \d, that differ"):
        compare_outputs(answers(change, at), reference, two_kinds(), "noise")


def test_large_logits_may_differ_as_much_as_their_size_lets_them():
    large = 1000 * LOGITS
    compare_outputs(
        lambda pixels: large[pixels.flatten().astype(int)].numpy() + np.float32(0.04),
        lambda pixels: large[pixels.flatten().long()],
        two_kinds(),
        "noise",
    )


def test_a_tie_may_fall_either_way_and_is_counted():
    tied = torch.tensor([[1.0, 1.0 - 2e-5]])
    found = compare_outputs(
        lambda pixels: np.repeat([[1.0 - 2e-5, 1.0]], len(pixels), 0).astype(np.float32),
        lambda pixels: tied.expand(len(pixels), 2),
        two_kinds(8),
        "noise",
    )
    assert (found.images, found.same_top1) == (8, 0)


def test_a_program_for_one_number_of_images_is_an_error():
    def fixed(pixels):
        if len(pixels) != 2:
            raise RuntimeError("INVALID_ARGUMENT: Got invalid dimensions\nfor input")
        return answers()(pixels)

    with pytest.raises(ParityError, match="can't run a batch of 1 images: INVALID_ARGUMENT: Got invalid dimensions"):
        compare_outputs(fixed, reference, two_kinds(), "noise")


def test_another_number_of_classes_is_an_error():
    with pytest.raises(ParityError, match=r"with \(1, 2\) numbers, torch with \(1, 3\)"):
        compare_outputs(lambda pixels: answers()(pixels)[:, :2], reference, two_kinds(), "noise")


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
