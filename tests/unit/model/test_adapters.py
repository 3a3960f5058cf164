import json

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

from hfft.errors import ModelError
from hfft.model.adapters import attach, merge, restore_adapter, save_adapter, targets
from hfft.model.anatomy import dissect
from hfft.recipe.spec import AdapterSpec


def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shaken(model):
    """Give every trainable tensor another value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            AdapterSpec(on="attention", blocks=1),
            {f"vit.layers.3.attention.{name}_proj" for name in "qkvo"},
        ),
        (AdapterSpec(on="mlp", blocks=1), {"vit.layers.3.mlp.fc1", "vit.layers.3.mlp.fc2"}),
        (
            AdapterSpec(on="all"),
            {f"vit.layers.{n}.attention.{name}_proj" for n in range(4) for name in "qkvo"}
            | {f"vit.layers.{n}.mlp.fc{k}" for n in range(4) for k in (1, 2)},
        ),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_exact_targets_for_vit(spec, expected):
    model = tiny.build("vit")
    assert set(targets(model, dissect(model), spec)) == expected


def test_convnext_gets_pointwise_layers_and_never_the_depthwise_ones_or_the_classifier():
    model = tiny.build("convnext")
    names = targets(model, dissect(model), AdapterSpec(on="mlp"))
    assert {name.rpartition(".")[2] for name in names if "downsampling" not in name} == {"pwconv1", "pwconv2"}
    assert "classifier" not in names


def test_a_role_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ModelError, match="no layer has the role 'attention'; this network has: mlp"):
        attach(tiny.build("convnext"), AdapterSpec(on="attention"))


def test_more_blocks_than_there_are():
    with pytest.raises(ModelError, match="asked for the last 9, but the network has 4"):
        attach(tiny.build("vit"), AdapterSpec(blocks=9))


@pytest.mark.parametrize("family", ["vit", "resnet", "timm_wrapper"])
def test_only_adapter_and_head_train(family):
    changes = {"architecture": "vit_tiny_patch16_224"} if family == "timm_wrapper" else {}
    model = attach(tiny.build(family, **changes), AdapterSpec(on="mlp"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
    head = [name for name in trainable if "modules_to_save" in name]
    assert {name.rpartition(".")[2] for name in head} == {"weight", "bias"}
    assert any("lora_" in name for name in trainable)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_the_merged_model_computes_the_same(family, method):
    model = shaken(attach(tiny.build(family), AdapterSpec(method=method, on="mlp")))
    with torch.inference_mode():
        adapted = model(pixel_values=pixels()).logits
        merged = merge(model)
        again = merged(pixel_values=pixels()).logits
    assert type(merged) is type(tiny.build(family))
    assert {name for name, _ in merged.named_parameters()} == {
        name for name, _ in tiny.build(family).named_parameters()
    }
    torch.testing.assert_close(again, adapted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT's own loader
def test_the_adapter_folder_is_a_complete_product(tmp_path):
    tiny.save(tmp_path / "base", "vit", classes=3)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    model = shaken(attach(model, AdapterSpec()))
    save_adapter(model, tiny.processor(), tmp_path / "adapter", base=str(tmp_path / "base"), revision="abc")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tmp_path / "base"), "abc")
    labels = json.loads((tmp_path / "adapter" / "config.json").read_text())["id2label"]
    assert labels == {"0": "ant", "1": "bee", "2": "cat"}
    assert (tmp_path / "adapter" / "preprocessor_config.json").is_file()

    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.inference_mode():
        assert torch.equal(opened(pixel_values=pixels()).logits, model(pixel_values=pixels()).logits)


def test_restore_brings_back_adapter_and_head(tmp_path):
    model = shaken(attach(tiny.build("vit"), AdapterSpec()))
    model.save_pretrained(tmp_path)
    other = attach(tiny.build("vit"), AdapterSpec())
    restore_adapter(other, tmp_path)
    with torch.inference_mode():
        assert torch.equal(other.eval()(pixel_values=pixels()).logits, model(pixel_values=pixels()).logits)
    assert any(parameter.requires_grad for parameter in other.parameters())
