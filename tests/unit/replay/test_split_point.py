from types import SimpleNamespace

import pytest
import tiny
import torch
from families import ALL_AT_NIGHT
from torch import nn

from hfft.model.freezing import held_modules, set_trainable, trainable_names
from hfft.model.restoring import random_states
from hfft.model.trace import trace
from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.replay.split_point import Prefix, find_split_point, split_point_at
from hfft.training.plan import prepare_phase

ONE = torch.zeros(1, 3, tiny.SIDE, tiny.SIDE)


def prepared(family, unfreeze, **changes):
    model = tiny.build(family, **changes)
    set_trainable(model, trainable_names(model, tiny.anatomy(family, **changes), unfreeze))
    return prepare_phase(model, PhaseSpec(name="p", unfreeze=unfreeze), ONE)


def photos(count=3, seed=1):
    return torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))


def step(model, pixels):
    """Logits and gradients of one training step as a phase makes it, from the same random state each time."""
    model.train()
    for module in held_modules(model, "eval"):
        module.training = False
    torch.manual_seed(5)
    logits = model(pixel_values=pixels).logits
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return logits.detach(), dict(
        zip(trainable, torch.autograd.grad(logits.square().sum(), list(trainable.values())), strict=True)
    )


@pytest.mark.parametrize("family", ALL_AT_NIGHT)
@pytest.mark.parametrize("unfreeze", ["head", {"blocks": 1}], ids=str)
def test_a_step_from_the_cut_is_the_step_from_the_pixels(family, unfreeze):
    model = prepared(family, unfreeze)
    pixels = photos()
    split_point = find_split_point(model, ONE)
    assert split_point is not None
    logits, gradients = step(model, pixels)
    with torch.no_grad():
        activations = Prefix(model.eval(), [split_point]).eval()(pixels)
    assert all(len(tensor) == 3 for tensor in activations)
    with split_point.bypassed():
        fed = split_point.feed(activations)
        replayed, others = step(model, fed)
    torch.testing.assert_close(replayed, logits, rtol=1e-5, atol=1e-7)
    assert gradients.keys() == others.keys()
    for name in gradients:
        torch.testing.assert_close(others[name], gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "unfreeze", "path"),
    [
        ("vit", "head", "classifier"),
        ("vit", {"blocks": 2}, "vit.layers.2"),
        ("vit", {"parts": ("norm",)}, "vit.layernorm"),
        ("convnext", {"stages": 1}, "convnext.encoder.stages.3.downsampling_layer.0"),
        ("resnet", {"blocks": 1}, "resnet.encoder.stages.3.layers.0"),
        ("mobilenet_v2", "head", "dropout"),  # between the encoder and the head, and at work in training
        ("deit+teacher", "head", "deit.layernorm"),  # in front of both heads
        ("swiftformer", "head", "norm"),
    ],
    ids=str,
)
def test_where_it_is(family, unfreeze, path):
    split_point = find_split_point(prepared(family, unfreeze), ONE)
    assert split_point is not None
    assert split_point.path == path


def test_where_an_adapter_begins():
    model = prepare_phase(tiny.build("vit"), PhaseSpec(name="p", adapter=AdapterSpec(on="all", blocks=1, r=2)), ONE)
    split_point = find_split_point(model, ONE)
    assert split_point is not None
    assert split_point.path == "vit.layers.3"
    assert (
        split_point.fingerprint == split_point_at(tiny.build("vit"), "vit.layers.3", ONE).fingerprint
    )  # of the same frozen weights


class Batched(nn.Module):
    """A normalisation in front of the head, by the running statistics or by those of the images at hand."""

    def __init__(self, *, running):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.BatchNorm2d(4, track_running_stats=running)
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(self.norm(self.stem(pixel_values)).mean((2, 3))))


@pytest.mark.parametrize(("running", "path"), [(True, "head"), (False, "norm")])
def test_what_depends_on_other_images_is_not_kept(running, path):
    model = Batched(running=running)
    set_trainable(model, {"head.weight", "head.bias"})
    split_point = find_split_point(model, ONE)
    assert split_point is not None
    assert split_point.path == path


@pytest.mark.parametrize("family", ["swin", "swinv2", "pvt_v2", "focalnet", "donut-swin"])
def test_checkpointed_activations_keep_the_place(family):
    """A whole stage is then computed again in the backward pass, with what lies in front of the split point in it."""
    plain = find_split_point(prepared(family, {"blocks": 1}), ONE)
    model = prepared(family, {"blocks": 1})
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    split_point = find_split_point(model, ONE)
    assert split_point is not None
    assert plain is not None
    assert split_point.path == plain.path


def test_random_numbers_of_an_accelerator_are_noticed(monkeypatch):
    """Its state is looked at with the CPU's; here a counter stands for it."""
    states = iter(range(100))
    fake = SimpleNamespace(get_rng_state=lambda device: torch.tensor(next(states)), manual_seed=lambda seed: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    first, second = random_states(torch.device("xpu:0")), random_states(torch.device("xpu:0"))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_nothing_is_in_front_of_the_stem():
    split_point = find_split_point(prepared("vit", "all"), ONE)
    assert split_point is None or split_point.depth <= 3  # the pixels themselves


def test_the_model_is_left_as_it_was():
    model = prepared("mobilenet_v2", {"blocks": 1})
    model.train()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert find_split_point(model, ONE, batchnorm="train") is not None
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_pass_for_several_cuts():
    model = tiny.build("vit")
    split_points = [split_point_at(model, path, ONE) for path in ("vit.layers.1", "vit.layers.3", "classifier")]
    with torch.no_grad():
        together = Prefix(model, split_points).eval()(photos())
        alone = [Prefix(model, [split_point]).eval()(photos()) for split_point in split_points]
    assert len(together) == 3
    assert all(torch.equal(one, more[0]) for one, more in zip(together, alone, strict=True))
    assert [split_point.depth for split_point in split_points] == sorted(
        split_point.depth for split_point in split_points
    )


def test_the_fingerprint_is_of_what_lies_in_front():
    model = tiny.build("vit")
    before = split_point_at(model, "vit.layers.2", ONE).fingerprint
    with torch.no_grad():
        model.vit.layers[2].mlp.fc1.weight.add_(1)
        model.classifier.weight.add_(1)
    assert split_point_at(model, "vit.layers.2", ONE).fingerprint == before
    with torch.no_grad():
        model.vit.embeddings.cls_token.add_(1)
    assert split_point_at(model, "vit.layers.2", ONE).fingerprint != before


def test_channels_last_activations_come_back_as_they_were():
    model = prepared("convnext", {"blocks": 1}).to(memory_format=torch.channels_last)
    split_point, seen = find_split_point(model, ONE), []
    assert split_point is not None
    with torch.no_grad():
        (activations,) = Prefix(model.eval(), [split_point]).eval()(photos())
    assert activations.is_contiguous(memory_format=torch.channels_last)
    with split_point.bypassed(), split_point.reached(lambda tensors: None):
        model.get_submodule("convnext.encoder.stages.3.downsampling_layer.0").register_forward_hook(
            lambda module, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        split_point.feed([activations.contiguous()])  # as they are kept
        model(pixel_values=ONE.expand(3, -1, -1, -1))
    assert seen == [True]


def test_trace_knows_order_and_shapes():
    calls = trace(tiny.build("vit"), photos(2))
    order = [path for path in calls if path in ("vit.embeddings", "vit.layers.0", "vit.layers.3", "classifier")]
    assert order == ["vit.embeddings", "vit.layers.0", "vit.layers.3", "classifier"]
    assert calls["vit.layers.0"].left < calls["vit.layers.1"].entered
    shape = calls["classifier"].output
    assert (shape.fixed, shape.growing, shape.is_per_image) == ((0, 2), (1, 0), True)
    assert shape.placeholder(5, torch.device("cpu")).shape == (5, 2)
