import json
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from hfft.errors import ModelError
from hfft.model.anatomy import REFUSED
from hfft.model.checkpoint import load_checkpoint, reopen, restore_weights, save_model, set_memory_format
from hfft.model.config import load_config, load_skeleton, resize_config, sample_pixels
from hfft.recipe.spec import ModelSpec

LABELS = ("ant", "bee", "cat")


def equal(left, right):
    others = right.state_dict()
    return all(torch.equal(value, others[name]) for name, value in left.state_dict().items())


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_each_family_gets_a_new_head_and_is_saved_reopened_and_restored(family, tmp_path):
    """The checkpoint's own ten labels are gone: a timm config keeps them under another name."""
    source = tiny.save(tmp_path / "c", family, classes=10)
    model, processor = load_checkpoint(ModelSpec(checkpoint=str(source)), LABELS)
    head = set(tiny.anatomy(family).part("head").tensors)
    old, new = dict(tiny.build(family, 10).named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(new[name], old[name]) for name in new.keys() - head)
    assert not any(new[name].any() for name in head)
    pixels = torch.randn(4, 3, tiny.SIDE, tiny.SIDE)
    loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(1.0986123, abs=1e-6)  # ln 3

    with torch.no_grad():
        for name in head:
            new[name].normal_(std=0.02)
    save_model(model, processor, tmp_path / "m")
    again, _ = reopen(tmp_path / "m")
    for config in (model.config, again.config):
        assert config.id2label == {0: "ant", 1: "bee", 2: "cat"}
        assert config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    assert equal(model, again)
    with torch.inference_mode():  # the last bit may depend on where in memory a weight lies
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits, rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    restore_weights(again, tmp_path / "m")
    assert equal(model, again)


def test_a_head_of_the_same_size_is_new_too(tmp_path):
    tiny.save(tmp_path / "c", "vit", classes=3)
    model, _ = load_checkpoint(ModelSpec(checkpoint=str(tmp_path / "c"), head="normal"), LABELS)
    assert not torch.equal(model.classifier.weight, tiny.build("vit", 3).classifier.weight)
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip"])
def test_the_image_tower_of_a_model_of_images_and_texts(family, tmp_path):
    both = AutoModel.from_config(tiny.build(family).config)
    both.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    model, _ = load_checkpoint(ModelSpec(checkpoint=str(tmp_path)), LABELS)
    want = dict(both.vision_model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in model.vision_model.named_parameters())


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_fine_tuned_is_refused_before_its_weights_are_read(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match="can't be fine-tuned: " + re.escape(REFUSED[family])):
        load_config(ModelSpec(checkpoint=str(tmp_path)), LABELS)


def test_a_config_that_does_not_say_which_class_it_is_of(tmp_path):
    folder = tiny.save(tmp_path / "c", "deit")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_checkpoint(ModelSpec(checkpoint=str(folder)), LABELS)
    assert type(model).__name__ == "DeiTForImageClassification"


@pytest.mark.parametrize("family", ["clip", "hiera", "levit"])
def test_image_size_sets_the_config_where_the_family_keeps_it(family):
    config = tiny.build(family).config
    assert resize_config(config, 64)
    section = config.vision_config if family == "clip" else config
    assert section.image_size == ([64, 64] if family == "hiera" else 64)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "swin", "convnext", "timm_wrapper"])
def test_a_network_that_interpolates_its_positions_takes_another_image_size(family, tmp_path):
    spec = ModelSpec(checkpoint=str(tiny.save(tmp_path / "c", family)), image_size=48)
    model, processor = load_checkpoint(spec, LABELS)
    assert sample_pixels(processor).shape == (1, 3, 48, 48)
    save_model(model, processor, tmp_path / "m")
    again, processor = reopen(tmp_path / "m")
    pixels = sample_pixels(processor)
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "levit"])
def test_an_image_size_that_weights_do_not_fit_is_refused_before_they_are_read(family, tmp_path):
    spec = ModelSpec(checkpoint=str(tiny.save(tmp_path / "c", family)), image_size=64)
    with pytest.raises(ModelError, match=r"^model.image_size: .* don't fit its network at image_size 64"):
        load_config(spec, LABELS)


def test_missing_encoder_weights_are_refused(tmp_path):
    folder = tiny.save(tmp_path / "c", "convnext")
    weights = load_file(folder / "model.safetensors")
    del weights["convnext.layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of the network.*convnext.layernorm.weight"):
        load_checkpoint(ModelSpec(checkpoint=str(folder)), LABELS)


def test_an_image_size_that_positions_do_not_fit_is_refused(tmp_path):
    tiny.save(tmp_path / "c", "vit")
    with pytest.raises(ModelError, match=r"image_size 64: .*position_embeddings"):
        load_checkpoint(ModelSpec(checkpoint=str(tmp_path / "c"), image_size=64), LABELS)


@pytest.mark.parametrize("family", ["convnext", "timm_wrapper"])
def test_image_size_sets_the_processor(family, tmp_path):
    tiny.save(tmp_path / "c", family)
    model, processor = load_checkpoint(ModelSpec(checkpoint=str(tmp_path / "c"), image_size=48), LABELS)
    image = tiny_image()
    assert processor(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)
    save_model(model, processor, tmp_path / "m")
    _, again = reopen(tmp_path / "m")
    pixels = [p(images=image, return_tensors="pt")["pixel_values"] for p in (processor, again)]
    assert torch.equal(*pixels)


def test_a_checkpoint_without_a_processor_is_refused(tmp_path):
    folder = tiny.save(tmp_path / "c", "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"no image processor \(preprocessor_config.json\)"):
        load_checkpoint(ModelSpec(checkpoint=str(folder)), LABELS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    spec = ModelSpec(checkpoint=str(tmp_path))
    config = load_config(spec, LABELS)
    with pytest.raises(ModelError, match="gave no image classifier"):
        load_skeleton(spec, config)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = tiny.save(tmp_path / "c", "vit")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="gave no image classifier"):
        load_checkpoint(ModelSpec(checkpoint=str(folder)), LABELS)


def test_a_skeleton_needs_no_weights(tmp_path):
    folder = tiny.save(tmp_path / "c", "vit")
    (folder / "model.safetensors").unlink()
    spec = ModelSpec(checkpoint=str(folder))
    model = load_skeleton(spec, load_config(spec, LABELS))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.classifier.weight.shape == (3, 16)


def test_plain_load_state_dict_skips_most_of_a_saved_vit(tmp_path):
    """Trap A: what Trainer 5.23 does when it resumes, or loads the best model."""
    saved = tiny.build("vit", 3)
    saved.save_pretrained(tmp_path)
    result = tiny.build("vit", 3).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert len(result.missing_keys) > len(saved.state_dict()) / 2


def test_the_probe_refuses_pixels_that_the_network_cannot_take(tmp_path):
    folder = tiny.save(tmp_path / "c", "vit")
    tiny.processor(side=48).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"\(1, 3, 48, 48\)"):
        load_checkpoint(ModelSpec(checkpoint=str(folder)), LABELS)


def test_a_finished_model_opens_with_the_auto_class(tmp_path):
    source = tiny.save(tmp_path / "c", "vit")
    model, processor = load_checkpoint(ModelSpec(checkpoint=str(source)), LABELS)
    save_model(model, processor, tmp_path / "m")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    assert again.config.id2label[2] == "cat"
    assert not list((tmp_path / "m").glob("*.bin"))


def tiny_image():
    from PIL import Image

    return Image.effect_noise((60, 50), 80).convert("RGB")


@pytest.mark.parametrize(
    ("family", "asked", "expected"),
    [
        ("convnext", "auto", True),
        ("vit", "auto", False),
        ("vit", "channels_last", True),
        ("resnet", "contiguous", False),
    ],
)
def test_convolutional_networks_lie_channels_last(family, asked, expected):
    model = tiny.build(family)
    set_memory_format(model, asked)
    kernels = [value for value in model.parameters() if value.ndim == 4 and min(value.shape[1:]) > 1]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) == expected for kernel in kernels)
    assert kernels


@pytest.mark.parametrize("family", ["vit", "clip", "swin", "timm_wrapper"])
def test_a_config_that_asks_for_more_than_logits_or_another_type_does_not_get_it(family, tmp_path):
    odd = {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "dtype": "float16"}
    folder = tiny.save(tmp_path / "c", family, classes=10)
    config = json.loads((folder / "config.json").read_text()) | odd
    (folder / "config.json").write_text(json.dumps(config))
    spec = ModelSpec(checkpoint=str(folder))
    pixels = torch.zeros(1, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        for model in (load_checkpoint(spec, LABELS)[0], reopen(folder)[0]):
            answer = model(pixel_values=pixels)
            assert set(answer) == {"logits"}
            assert answer.logits.dtype == torch.float32
        load_skeleton(spec, load_config(spec, LABELS)).eval()(pixel_values=pixels.to("meta"))
