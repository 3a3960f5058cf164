import re

import pytest
import tiny
import torch
from strange_net import StrangeConfig, StrangeNet
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hfft.errors import ModelError
from hfft.model.adapters import attach
from hfft.model.anatomy import PEFT_PREFIX, REFUSED, block_paths, dissect, tensor_names
from hfft.recipe.spec import AdapterSpec

TIMM = (
    "tf_efficientnet_lite0",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mobilenetv2_050",
    "swin_tiny_patch4_window7_224",
)
CASES = [
    *((family, {}, tiny.SIDE) for family in tiny.CONFIGS),
    *(("timm_wrapper", {"architecture": name}, 224) for name in TIMM),
]
FOUR = ("beit", "clip", "data2vec-vision", "deit", "deit+teacher", "dinov2", "dinov2_with_registers", "ijepa")
FIVE = ("bit", "convnext", "convnextv2", "focalnet", "hgnet_v2", "hiera", "mobilevit", "mobilevitv2", "poolformer")
BLOCKS = {
    **dict.fromkeys(
        (*FOUR, "donut-swin", "metaclip_2", "siglip", "swin", "swinv2", "timm_wrapper", "vit", "vit_msn"), 4
    ),
    **dict.fromkeys((*FIVE, "pvt", "pvt_v2", "regnet", "resnet", "segformer", "swiftformer", "textnet"), 5),
    **dict.fromkeys(("perceiver", "perceiver+conv", "perceiver+fourier"), 3),
    **dict.fromkeys(("levit", "levit+teacher"), 12),
    "cvt": 6,
    "efficientnet": 7,
    "mobilenet_v1": 26,
    "mobilenet_v2": 16,
}


def ids(value):
    return value.get("architecture", "") if isinstance(value, dict) else str(value)


def test_every_family_and_class_that_transformers_maps_is_built_here_or_refused():
    """A release that adds a family fails here until somebody has looked at it."""
    built = {name.partition("+")[0] for name in tiny.CONFIGS}
    assert built | REFUSED.keys() == set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    assert not built & REFUSED.keys()
    entries = [MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[family] for family in built]
    names = {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}
    assert {type(tiny.build(name)).__name__ for name in tiny.CONFIGS} == names


@pytest.mark.parametrize(("family", "changes", "side"), CASES, ids=ids)
def test_parts_of_each_family(family, changes, side):
    """They hold every tensor once, in the order of the forward pass, and the head depends on the number of classes."""
    model, anatomy = tiny.build(family, **changes), tiny.anatomy(family, **changes)
    placed = [name for part in anatomy.parts for name in part.tensors]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(tensor_names(model))
    assert [part.name for part in anatomy.parts] == [
        "stem",
        *(f"block {number}" for number in range(len(anatomy.blocks))),
        "norm",
        "head",
    ]
    more = dict(tiny.build(family, 5, **changes).named_parameters())
    resized = {name for name, parameter in model.named_parameters() if parameter.shape != more[name].shape}
    assert resized == set(anatomy.part("head").tensors)
    order = {name: place for place, part in enumerate(anatomy.parts) for name in part.tensors}
    called: list[int] = []

    def note(prefix):
        def hook(module, inputs):
            own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
            # a module of leaves only: one that holds others is entered before them, whatever its own tensors' part
            if own and next(module.children(), None) is None:
                called.append(order[own[0]])

        return hook

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(note(prefix))
    with torch.inference_mode():
        model(pixel_values=torch.randn(1, 3, side, side))
    if family == "levit+teacher":
        called.remove(len(anatomy.parts) - 1)  # two heads side by side, each with a BatchNorm in front of it
    assert called == sorted(called)
    assert called[-1] == len(anatomy.parts) - 1


def test_stages_are_labelled():
    stages = [block.stage for block in tiny.anatomy("convnext").blocks]
    assert stages == [0, 1, 2, 2, 3]


def test_downsampling_belongs_to_the_stage_it_opens():
    anatomy = tiny.anatomy("convnext")
    owner = {name: part for part in anatomy.parts for name in part.tensors}
    part = owner["convnext.encoder.stages.3.downsampling_layer.1.weight"]
    assert (part.name, part.stage) == ("block 4", 3)


def with_type(model_type):
    model = tiny.build("vit")
    model.config.model_type = model_type
    return model


def test_an_architecture_that_nobody_listed_has_its_parts_in_the_order_of_the_forward_pass():
    """Its head is registered first, and a stage's downsampling after the stage's blocks."""
    parts = dissect(StrangeNet(StrangeConfig(num_labels=3))).parts
    assert [(part.name, part.stage) for part in parts] == [
        ("stem", None),
        ("block 0", 0),
        ("block 1", 1),
        ("block 2", 1),
        ("norm", None),
        ("head", None),
    ]
    tensors = {part.name: set(part.tensors) for part in parts}
    assert tensors["stem"] == {"scale", "entry.weight", "entry.bias", "levels.0.shift"}
    assert {"levels.1.shift", "levels.1.shrink.weight", "levels.1.shrink.bias"} < tensors["block 1"]
    assert tensors["block 2"] == {
        f"levels.1.steps.1.{name}" for name in tensor_names(StrangeNet(StrangeConfig()).levels[1].steps[1])
    }
    assert tensors["norm"] == {"last_norm.weight", "last_norm.bias"}
    assert tensors["head"] == {"answer.weight", "answer.bias"}


def test_an_architecture_whose_blocks_run_twice_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"'strange' is not supported: .*levels.#.*don't run once each"):
        dissect(StrangeNet(StrangeConfig(loops=2)))


def test_an_architecture_without_blocks_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"'strange' is not supported: it has no numbered modules"):
        dissect(StrangeNet(StrangeConfig(depths=())))


def test_an_architecture_that_does_not_run_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"'strange' can't be traced: .*[Kk]ernel size"):
        dissect(StrangeNet(StrangeConfig(image_size=2)))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_fine_tuned_is_refused_with_the_reason(family):
    with pytest.raises(ModelError, match=re.escape(f"{family!r} can't be fine-tuned: {REFUSED[family]}")):
        dissect(with_type(family))


def test_an_unknown_part_is_refused():
    with pytest.raises(ModelError, match="called 'blocks 1'"):
        tiny.anatomy("vit").part("blocks 1")


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_each_block_is_a_module(family):
    """What of a block lies outside of its module comes before it: downsampling, a stage's tokens."""
    model = tiny.build(family)
    modules, blocks = block_paths(model), tiny.anatomy(family).blocks
    assert len(blocks) == BLOCKS[family]
    assert len(modules) == len(set(modules)) == BLOCKS[family]
    for block in blocks:
        (path,) = {path for path in modules for name in block.tensors if name.startswith(f"{path}.")}
        inside = set(tensor_names(model.get_submodule(path)))
        assert {name.removeprefix(f"{path}.") for name in block.tensors} >= inside


def test_blocks_of_an_adapted_network_are_the_modules_in_it():
    plain = tiny.build("vit")
    names = block_paths(plain)
    assert block_paths(attach(plain, AdapterSpec())) == [f"{PEFT_PREFIX}{name}" for name in names]
