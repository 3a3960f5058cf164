import pytest
import tiny
import torch
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, CLIPConfig, CLIPForImageClassification

from hfft.errors import ModelError
from hfft.model.anatomy import dissect, families, tensor_names

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
BLOCKS = {
    **dict.fromkeys(
        ("beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "ijepa", "vit", "vit_msn"), 4
    ),
    **dict.fromkeys(("bit", "convnext", "convnextv2", "focalnet", "poolformer", "regnet", "resnet"), 5),
    **dict.fromkeys(("swin", "swinv2", "timm_wrapper"), 4),
    "efficientnet": 7,
    "mobilenet_v1": 26,
    "mobilenet_v2": 16,
}


def ids(value):
    return value.get("architecture", "") if isinstance(value, dict) else str(value)


def test_every_known_family_is_built_here():
    assert set(families()) == set(tiny.CONFIGS)
    mapped = {config.model_type for config in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}
    assert set(families()) <= mapped


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_number_of_blocks(family):
    assert len(dissect(tiny.build(family)).blocks) == BLOCKS[family]


@pytest.mark.parametrize(("family", "changes", "side"), CASES, ids=ids)
def test_parts_cover_every_tensor_once_and_follow_the_forward_pass(family, changes, side):
    model = tiny.build(family, **changes)
    anatomy = dissect(model)
    placed = [name for part in anatomy.parts for name in part.tensors]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(tensor_names(model))
    assert [part.name for part in anatomy.parts] == [
        "stem",
        *(f"block {number}" for number in range(len(anatomy.blocks))),
        "norm",
        "head",
    ]
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
    assert called == sorted(called)
    assert called[-1] == len(anatomy.parts) - 1


@pytest.mark.parametrize(("family", "changes", "side"), CASES, ids=ids)
def test_the_head_is_what_depends_on_the_number_of_classes(family, changes, side):
    def shapes(classes):
        return {name: p.shape for name, p in tiny.build(family, classes, **changes).named_parameters()}

    two, five = shapes(2), shapes(5)
    resized = {name for name in two if two[name] != five[name]}
    model = tiny.build(family, 2, **changes)
    assert resized == set(dissect(model).part("head").tensors)


def test_stages_are_labelled():
    stages = [block.stage for block in dissect(tiny.build("convnext")).blocks]
    assert stages == [0, 1, 2, 2, 3]


def test_downsampling_belongs_to_the_stage_it_opens():
    anatomy = dissect(tiny.build("convnext"))
    owner = {name: part for part in anatomy.parts for name in part.tensors}
    part = owner["convnext.encoder.stages.3.downsampling_layer.1.weight"]
    assert (part.name, part.stage) == ("block 4", 3)


def test_an_unknown_family_is_refused_by_name():
    config = CLIPConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    )
    with pytest.raises(ModelError, match=r"'clip' is not supported yet; supported: .*vit"):
        dissect(CLIPForImageClassification(config))


def test_an_unknown_part_is_refused():
    with pytest.raises(ModelError, match=r"no part is called 'blocks 1'; the parts are stem, block 0..3, norm, head"):
        dissect(tiny.build("vit")).part("blocks 1")
