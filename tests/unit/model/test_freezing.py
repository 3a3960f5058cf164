import pytest
import tiny
import torch
from torch import nn

from hfft.errors import ModelError, TrainingError
from hfft.model.anatomy import dissect
from hfft.model.freezing import Freeze, set_trainable, trainable_names, unused_parameters

VIT_LAYER = [
    f"{layer}.{kind}"
    for layer in (
        *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        *("layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"),
    )
    for kind in ("weight", "bias")
]
HEAD = {"classifier.weight", "classifier.bias"}
NORM = {"vit.layernorm.weight", "vit.layernorm.bias"}


def vit_block(number):
    return {f"vit.layers.{number}.{name}" for name in VIT_LAYER}


def released(family, unfreeze):
    model = tiny.build(family)
    set_trainable(model, trainable_names(model, tiny.anatomy(family), unfreeze))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("unfreeze", "expected"),
    [
        ("head", HEAD),
        ({"blocks": 1}, HEAD | NORM | vit_block(3)),
        ({"blocks": 3}, HEAD | NORM | vit_block(1) | vit_block(2) | vit_block(3)),
        ({"layers": 1}, HEAD | NORM),
        ({"layers": 2}, HEAD | NORM | {"vit.layers.3.mlp.fc2.weight", "vit.layers.3.mlp.fc2.bias"}),
        ({"blocks": "first 1"}, HEAD | vit_block(0)),
        ({"blocks": "first 4"}, HEAD | vit_block(0) | vit_block(1) | vit_block(2) | vit_block(3)),
        ({"parts": ("block 0",)}, HEAD | vit_block(0)),
        ({"parts": ("block 1..2", "norm")}, HEAD | NORM | vit_block(1) | vit_block(2)),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_exact_names_for_vit(unfreeze, expected):
    assert released("vit", unfreeze) == expected


def test_all():
    model = tiny.build("vit")
    assert released("vit", "all") == {name for name, _ in model.named_parameters()}


def test_the_last_stage_of_convnext_with_its_downsampling():
    names = released("convnext", {"stages": 1})
    expected = {
        name
        for name, _ in tiny.build("convnext").named_parameters()
        if name.startswith(("convnext.encoder.stages.3.", "convnext.layernorm.", "classifier."))
    }
    assert names == expected
    assert "convnext.encoder.stages.3.downsampling_layer.1.weight" in names


# What the families here normalise with, subclasses included.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def owned(model, kinds, names="weight bias"):
    return {
        f"{prefix}.{own}"
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for own, _ in module.named_parameters(recurse=False)
        if own in names.split()
    }


@pytest.mark.parametrize(
    ("family", "unfreeze", "message"),
    [
        ("vit", {"blocks": 5}, "asked for the last 5 blocks, but the network has 4"),
        ("vit", {"blocks": "first 5"}, "asked for the first 5 blocks, but the network has 4"),
        ("convnext", {"stages": 5}, "asked for the last 5 stages, but the network has 4"),
        ("vit", {"stages": 1}, "has no stages"),
        ("vit", {"parts": ("block 7",)}, "no part is called 'block 7'"),
    ],
    ids=str,
)
def test_more_than_there_is(family, unfreeze, message):
    with pytest.raises(ModelError, match=message):
        released(family, unfreeze)


UNUSED = {
    "clip": {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"},
    "dinov2": {"dinov2.embeddings.mask_token"},
    "dinov2_with_registers": {"dinov2_with_registers.embeddings.mask_token"},
    "metaclip_2": {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"},
    "siglip": {
        "vision_model.head.probe",
        "vision_model.head.attention.in_proj_weight",
        "vision_model.head.attention.in_proj_bias",
        *(
            f"vision_model.head.{layer}.{kind}"
            for layer in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        ),
    },
}


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_norms_biases_and_unused_parameters_of_each_family(family):
    model = tiny.build(family)
    head = set(tiny.anatomy(family).part("head").tensors)
    biases = owned(model, (*NORMS, nn.Linear, nn.Conv2d), "bias")
    biases |= owned(model, nn.MultiheadAttention, "in_proj_bias")  # SigLIP's pooling
    if family == "convnextv2":  # its response normalisation
        biases |= owned(model, type(model.convnextv2.encoder.stages[0].layers[0].grn), "bias")
    assert released(family, "norm") == owned(model, NORMS) | head
    assert released(family, "bias") == biases | head
    assert unused_parameters(model, torch.zeros(2, 3, tiny.SIDE, tiny.SIDE)) == UNUSED.get(family, set())


def test_looking_for_unused_parameters_leaves_the_model_and_the_random_state_alone():
    model = tiny.build("resnet").train()
    model.resnet.embedder.eval()
    set_trainable(model, {"classifier.1.weight"})
    model.classifier[1].weight.grad = torch.ones_like(model.classifier[1].weight)
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert unused_parameters(model, torch.zeros(2, 3, 32, 32)) == set()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert model.classifier[1].weight.grad.eq(1).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parameters_are_not_called_unused():
    model = tiny.build("dinov2")
    set_trainable(model, trainable_names(model, dissect(model), {"blocks": 4}))
    assert unused_parameters(model, torch.zeros(2, 3, 32, 32)) == set()


def test_frozen_parts_stay_in_evaluation_mode_and_released_ones_train():
    model = tiny.build("vit")
    set_trainable(model, trainable_names(model, dissect(model), {"blocks": 1}))
    freeze = Freeze(model)
    model.train()
    freeze.hold()
    assert not model.vit.embeddings.training
    assert not model.vit.embeddings.dropout.training
    assert not any(module.training for module in model.vit.layers[2].modules())
    assert all(module.training for module in model.vit.layers[3].modules())
    assert model.classifier.training


def test_dropout_before_the_head_trains_in_the_head_phase():
    model = tiny.build("mobilenet_v2")
    set_trainable(model, trainable_names(model, dissect(model), "head"))
    freeze = Freeze(model)
    model.train()
    freeze.hold()
    assert model.dropout.training
    assert not any(module.training for module in model.mobilenet_v2.modules())


@pytest.mark.parametrize(("batchnorm", "moves"), [("eval", False), ("train", True)])
def test_batchnorm_of_released_blocks(batchnorm, moves):
    model = tiny.build("resnet")
    set_trainable(model, trainable_names(model, dissect(model), {"blocks": 1}))
    freeze = Freeze(model, batchnorm=batchnorm)
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_mean")}
    model.train()
    freeze.hold()
    model(pixel_values=torch.randn(4, 3, 32, 32))
    moved = {name for name, value in model.named_buffers() if name in before and not torch.equal(value, before[name])}
    assert bool(moved) == moves
    assert all(name.startswith("resnet.encoder.stages.3.") for name in moved)
    assert freeze.prove()["changed"] == 0


def test_plain_training_mode_moves_the_statistics_of_a_network_without_gradients():
    """Trap D: what `requires_grad_(False)` alone does."""
    model = tiny.build("resnet").requires_grad_(False).train()
    before = model.resnet.embedder.embedder.normalization.running_mean.clone()
    model(pixel_values=torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.resnet.embedder.embedder.normalization.running_mean, before)


@pytest.mark.parametrize("name", ["resnet.embedder.embedder.convolution.weight", "running_mean"])
def test_the_proof_names_a_frozen_tensor_that_changed(name):
    model = tiny.build("resnet")
    set_trainable(model, trainable_names(model, dissect(model), "head"))
    freeze = Freeze(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = next(key for key in tensors if name in key)
    with torch.no_grad():
        tensors[changed].view(-1)[0] += 1e-6
    with pytest.raises(TrainingError, match=f"1 frozen tensors changed during the phase, the first is {changed}"):
        freeze.prove()


def test_the_proof_counts_what_it_compared():
    model = nn.ModuleDict({"frozen": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2), "open": nn.Linear(2, 2)})
    set_trainable(model, {"open.weight", "open.bias"})
    proof = Freeze(model).prove()
    # weight and bias; BatchNorm's weight, bias, mean, variance and its count of int64
    assert (proof["tensors"], proof["bytes"]) == (7, 4 * (6 + 2 + 2 + 2 + 2 + 2) + 8)


def test_the_proof_reads_another_copy_of_the_network_by_name():
    """As under FSDP, where what is trained is gathered into one that was kept aside."""
    model, other = tiny.build("resnet"), tiny.build("resnet")
    set_trainable(model, trainable_names(model, dissect(model), "head"))
    freeze = Freeze(model)
    buffers = {name for name, _ in model.named_buffers()}
    assert freeze.names == ({name for name, _ in model.named_parameters()} | buffers) - {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    with torch.no_grad():
        other.classifier[1].weight += 1
        proof = freeze.prove(other)
        assert proof == freeze.prove()
        other.resnet.embedder.embedder.normalization.running_var[0] += 1e-6
    with pytest.raises(TrainingError, match=r"1 frozen tensors changed.*embedder.normalization.running_var"):
        freeze.prove(other)
