import json
import shutil
from itertools import product
from typing import get_args, get_type_hints

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

from hfft.errors import ModelError
from hfft.model.adapters import (
    attach,
    check_adapter,
    is_adapter_tensor,
    merge,
    open_adapter,
    restore_adapter,
    save_adapter,
    targets,
)
from hfft.model.anatomy import dissect
from hfft.model.checkpoint import reopen
from hfft.recipe.spec import AdapterSpec


def pixels(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


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
    assert set(targets(model, tiny.anatomy("vit"), spec)) == expected


def test_convnext_gets_pointwise_layers_and_never_the_depthwise_ones_or_the_classifier():
    model = tiny.build("convnext")
    names = targets(model, tiny.anatomy("convnext"), AdapterSpec(on="mlp"))
    assert {name.rpartition(".")[2] for name in names if "downsampling" not in name} == {"pwconv1", "pwconv2"}
    assert "classifier" not in names


def test_a_role_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ModelError, match="the role 'attention'"):
        attach(tiny.build("convnext"), AdapterSpec(on="attention"))


# Every convolution of BiT is weight-standardised, and MobileNet V1 and V2 read a convolution's stride from outside.
NO_ADAPTER = {
    "bit": "WeightStandardizedConv2d",
    "mobilenet_v1": "Conv2d with tf_padding",
    "mobilenet_v2": "Conv2d with tf_padding",
}
# What tests/unit/model/test_family_table.py doesn't try; timm: several kinds of layers, same-padding convolutions too.
CASES = [
    ("mobilenet_v1", {"tf_padding": False}, 32),
    ("mobilenet_v2", {"tf_padding": False}, 32),
    *(
        ("timm_wrapper", {"architecture": name}, side)
        for name, side in (("tf_efficientnet_lite0", 64), ("vit_tiny_patch16_224", 224), ("convnext_atto", 64))
    ),
]


@pytest.mark.parametrize(("family", "kind"), NO_ADAPTER.items())
def test_families_without_a_layer_that_can_carry_an_adapter(family, kind):
    message = rf"this network has: none \(PEFT can't wrap and merge its {kind}\); unfreeze blocks instead"
    with pytest.raises(ModelError, match=message):
        attach(tiny.build(family), AdapterSpec(on="all"))


def test_a_standardised_network_of_timm_is_refused_too():
    with torch.device("meta"):
        model = tiny.build("timm_wrapper", architecture="resnetv2_50x1_bit")
    with pytest.raises(ModelError, match="merge its StdConv2d"):
        targets(model, dissect(model), AdapterSpec(on="all"))


def assert_gradients(model):
    """All that trains has one; some of so small networks are 0: attention among one token, dead ReLU."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > len(gradients) / 2


@pytest.mark.parametrize(("family", "changes", "side"), CASES, ids=str)
def test_an_adapter_trains_and_is_merged(family, changes, side):
    model = shaken(attach(tiny.build(family, **changes), AdapterSpec(on="all")))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {
        name for name, _ in model.named_parameters() if "modules_to_save" in name
    }
    logits = model(pixel_values=pixels(side)).logits
    logits.square().sum().backward()
    assert_gradients(model)
    plain = tiny.build(family, **changes)
    with torch.inference_mode():
        merged = merge(model)
        again = merged(pixel_values=pixels(side)).logits
        assert not torch.allclose(again, plain(pixel_values=pixels(side)).logits, rtol=0.01)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}
    scale = max(1, logits.abs().max().item())
    torch.testing.assert_close(again, logits.detach(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["vit", "siglip", "levit"])
def test_an_adapter_that_every_image_passes_is_fine(family):
    check_adapter(attach(tiny.build(family), AdapterSpec()), pixels())


def build_timm(architecture, **arguments):
    return tiny.build("timm_wrapper", architecture=architecture, model_args=arguments)


def test_an_adapter_on_a_layer_that_is_never_called_is_refused():
    model = build_timm("beit_base_patch16_224", embed_dim=24, depth=2, num_heads=2)
    message = r"uses the weights of 2 layers without calling them.*\(timm_model.blocks.0.attn.qkv, "
    with pytest.raises(ModelError, match=message):
        check_adapter(attach(model, AdapterSpec(on="attention")), pixels(224))
    check_adapter(attach(build_timm("beit_base_patch16_224", depth=1), AdapterSpec(on="mlp")), pixels(224))


def test_a_network_that_reads_what_a_wrapped_layer_does_not_have_is_refused():
    model = build_timm("davit_tiny", embed_dims=(8, 12, 16, 24), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))
    with pytest.raises(ModelError, match="doesn't run with it: 'Conv2d' object has no attribute 'kernel_size'"):
        check_adapter(attach(model, AdapterSpec(on="all")), pixels(224))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("levit", {"LevitAttention", "LevitAttentionSubsample"}),
        ("swin", {"SwinAttention"}),
        ("pvt", {"PvtAttention"}),
        ("swiftformer", {"SwiftFormerEfficientAdditiveAttention"}),
    ],
)
def test_attention_is_known_by_its_class(family, kinds):
    model = tiny.build(family)
    names = set(targets(model, tiny.anatomy(family), AdapterSpec(on="attention")))
    inside = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if type(module).__name__ in kinds
        for name, layer in module.named_modules()
        if type(layer) in (torch.nn.Linear, torch.nn.Conv2d) and getattr(layer, "groups", 1) == 1
    }
    assert names == inside


def test_the_squeeze_and_excitation_of_regnet_is_no_attention():
    with pytest.raises(ModelError, match="the role 'attention'"):
        attach(tiny.build("regnet"), AdapterSpec(on="attention"))


def test_a_dilated_convolution_is_left_out():
    model = tiny.build("resnet")
    layer = model.resnet.encoder.stages[3].layers[0].layer[1].convolution
    layer.dilation, layer.padding = (2, 2), (2, 2)
    names = targets(model, tiny.anatomy("resnet"), AdapterSpec(on="all", blocks=1))
    assert "resnet.encoder.stages.3.layers.0.layer.1.convolution" not in names
    assert "resnet.encoder.stages.3.layers.0.layer.0.convolution" in names


def test_more_blocks_than_there_are():
    with pytest.raises(ModelError, match="the last 9"):
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


METHODS = get_args(get_type_hints(AdapterSpec)["method"])
ON_CONVOLUTIONS = ("lora", "dora", "rslora", "ia3")


@pytest.mark.parametrize(
    ("family", "method"),
    [*product(("vit", "resnet"), METHODS), ("convnext", "dora"), ("perceiver", "ia3")],
)
def test_the_merged_model_computes_the_same(family, method):
    if family == "resnet" and method not in ON_CONVOLUTIONS:
        with pytest.raises(ModelError, match=f"Conv2d with {method}"):
            attach(tiny.build(family), AdapterSpec(method=method, on="mlp"))
        return
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


@pytest.mark.parametrize("family", [family for family in tiny.CONFIGS if family not in NO_ADAPTER])
def test_an_adapted_network_of_each_family_has_the_same_parts_trains_and_can_be_restored(family, tmp_path):
    model, other = (attach(tiny.build(family), AdapterSpec(on="all")) for _ in range(2))
    parts = dissect(model).parts
    assert [(part.name, part.stage) for part in parts] == [(p.name, p.stage) for p in tiny.anatomy(family).parts]
    for part in parts:
        assert part.name.startswith("block ") or not any("lora_" in name for name in part.tensors)
        assert (part.name == "head") == any("modules_to_save" in name for name in part.tensors)
    shaken(model)(pixel_values=pixels()).logits.square().sum().backward()
    assert_gradients(model)
    model.save_pretrained(tmp_path)
    restore_adapter(other, tmp_path)
    with torch.inference_mode():
        assert torch.equal(other.eval()(pixel_values=pixels()).logits, model(pixel_values=pixels()).logits)
    trainable = [{name for name, p in one.named_parameters() if p.requires_grad} for one in (model, other)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize("method", METHODS)
def test_what_an_adapter_adds_is_known_by_name(method):
    plain = tiny.build("vit")
    assert not any(map(is_adapter_tensor, plain.state_dict()))
    parameters = dict(attach(plain, AdapterSpec(method=method, on="all")).named_parameters())
    added = {name for name in parameters if is_adapter_tensor(name)}
    assert added == {name for name, p in parameters.items() if p.requires_grad and "modules_to_save" not in name}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21's own
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_opens_on_its_base_and_through_peft_alone(method, tmp_path):
    base = tiny.save(tmp_path / "base", "vit", classes=2)
    plain, processor = reopen(base)
    model = shaken(attach(plain, AdapterSpec(method=method, on="all")))
    with torch.inference_mode():
        expected = model(pixel_values=pixels()).logits
    save_adapter(model, processor, tmp_path / "adapter", base=str(base), revision=None)
    opened, _ = open_adapter(tmp_path / "adapter")
    through_peft = PeftModel.from_pretrained(reopen(base)[0], str(tmp_path / "adapter")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(opened(pixel_values=pixels()).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(through_peft(pixel_values=pixels()).logits, expected, rtol=0, atol=1e-5)


def test_an_adapter_without_its_base_says_so(tmp_path):
    base = tiny.save(tmp_path / "base", "vit", classes=2)
    plain, processor = reopen(base)
    save_adapter(attach(plain, AdapterSpec()), processor, tmp_path / "adapter", base=str(base), revision=None)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"what the adapter sits on can't be loaded: .*is no folder here"):
        open_adapter(tmp_path / "adapter")


def test_pissa_has_no_more_singular_values_than_a_layer():
    with pytest.raises(ModelError, match=r"17, but vit.layers.0.attention.q_proj has 16"):
        attach(tiny.build("vit"), AdapterSpec(method="pissa", r=17))
