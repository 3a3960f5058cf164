import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import toy
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hfft.data.images.batches import FILLER
from hfft.errors import ModelError, RecipeError
from hfft.model.anatomy import dissect
from hfft.recipe.spec import AdapterSpec, GradualSpec, PhaseSpec
from hfft.training.plan import expand_phases, parameter_groups, plan_phase, prepare_phase
from hfft.training.settings import training_arguments, try_arguments
from hfft.training.trainer import PhaseTrainer


def planned(family, *, images=100, processes=1, **phase):
    spec = PhaseSpec(name="p", **{"solver": "steps", **phase})
    return plan_phase(prepare_phase(tiny.build(family), spec), spec, images=images, processes=processes)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"unfreeze": "head"}, "head"),
        ({"unfreeze": {"blocks": 2}}, "blocks 2-3 of 4, norm, head"),
        ({"unfreeze": {"blocks": 1}}, "block 3 of 4, norm, head"),
        ({"unfreeze": {"parts": ["stem", "block 0", "block 3"]}}, "stem, blocks 0, 3 of 4, head"),
        ({"unfreeze": "all"}, "stem, blocks 0-3 of 4, norm, head"),
        ({"adapter": AdapterSpec()}, "adapter in blocks 0-3 of 4, head"),
    ],
    ids=str,
)
def test_in_words(phase, words):
    assert planned("vit", **phase).trains == words


def test_counts():
    plan = planned("vit", unfreeze={"blocks": 1})
    width, inner, classes = 16, 32, 2
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    assert plan.trainable == block + 2 * width + width * classes + classes
    assert plan.total == sum(p.numel() for p in tiny.build("vit").parameters())
    assert plan.state_bytes == 4 * plan.total + 12 * plan.trainable


@pytest.mark.parametrize(
    ("images", "batch", "accumulation", "processes", "epochs"),
    [(100, 8, 1, 1, 3), (100, 8, 4, 1, 2), (101, 8, 1, 2, 1), (7, 4, 2, 2, 2), (100, 8, 3, 2, 1.5)],
)
def test_steps_are_those_that_the_trainer_takes(images, batch, accumulation, processes, epochs):
    arguments = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
    }
    plan = planned("vit", images=images, processes=processes, unfreeze="head", arguments=arguments)
    loader = math.ceil(math.ceil(images / batch) / processes)  # batches of one process, shared evenly
    updates = max(loader // accumulation + int(loader % accumulation > 0), 1)  # Trainer.set_initial_training_values
    assert plan.steps == math.ceil(epochs * updates)
    assert plan.batch == batch * accumulation * processes


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(
    ("images", "batch", "processes"), [(12, 6, 2), (12, 1, 12), (13, 6, 2), (78, 6, 12), (21, 2, 2), (100, 8, 3)]
)
def test_shares_are_what_accelerate_deals(images, batch, processes, drops):
    settings = {"per_device_train_batch_size": batch, "dataloader_drop_last": drops}
    arguments = SimpleNamespace(**settings, world_size=processes, seed=0)
    trainer: Any = SimpleNamespace(args=arguments, train_dataset=toy.phase_data(train=images).train, chances=None)
    batches = BatchSampler(PhaseTrainer._get_train_sampler(trainer), batch, drops)
    dealt = [[*BatchSamplerShard(batches, processes, rank)] for rank in range(processes)]
    seen = [[index for indices in share for index in indices if index != FILLER] for share in dealt]
    plan = planned("vit", images=images, processes=processes, arguments={**settings, "num_train_epochs": 1})
    assert plan.shares == (min(map(len, seen)), max(map(len, seen)))
    assert plan.steps == len(dealt[0])
    together = sorted(index for share in seen for index in share)
    assert len(together) == len(set(together))  # every image once
    assert drops or together == [*range(images)]


@pytest.mark.parametrize(
    ("images", "batch", "processes", "drops", "advice"),
    [
        (12, 6, 12, False, "launch 2, or set per_device_train_batch_size=1"),
        (7, 8, 2, False, "launch 1, or set per_device_train_batch_size=3"),
        (12, 6, 12, True, "launch 2, or set per_device_train_batch_size=1"),
        (3, 1, 4, False, "launch 3"),
        (3, 8, 4, True, "launch 1 with per_device_train_batch_size=3"),
        (10, 16, 1, True, "set per_device_train_batch_size=10"),
    ],
)
def test_processes_without_an_image_are_refused_with_what_would_do(images, batch, processes, drops, advice):
    arguments = {"per_device_train_batch_size": batch, "dataloader_drop_last": drops}
    with pytest.raises(RecipeError, match=rf"^phases\.p: {images} training images .*; {advice}$"):
        planned("vit", images=images, processes=processes, arguments=arguments)


@pytest.mark.parametrize(
    ("images", "batch", "accumulation", "processes", "words"),
    [
        (100, 8, 1, 1, "39 steps of 8 images"),
        (100, 8, 2, 2, "12 steps of 32 images (8 at once on each of 2 processes, 2 accumulated)"),
        (12, 32, 1, 1, "3 steps of all 12 images (there is room for 32)"),
        (12, 6, 2, 2,
         "3 steps of all 12 images (there is room for 24: 6 at once on each of 2 processes, 2 accumulated)"),
    ],
)  # fmt: skip
def test_steps_in_words(images, batch, accumulation, processes, words):
    arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert planned("vit", images=images, processes=processes, arguments=arguments).steps_in_words == words


def test_one_step_in_words():
    plan = planned("vit", images=12, arguments={"per_device_train_batch_size": 12, "num_train_epochs": 1})
    assert plan.steps_in_words == "1 step of 12 images"


def test_layer_decay_shrinks_the_rate_from_the_head_down():
    plan = planned("vit", unfreeze="all", layer_decay=0.5, arguments={"learning_rate": 0.32})
    rates = {group.part: group.learning_rate for group in plan.groups}
    expected = {"head": 0.32, "norm": 0.32, "block 3": 0.16, "block 2": 0.08, "block 1": 0.04, "block 0": 0.02}
    assert rates == pytest.approx({**expected, "stem": 0.01})


def test_every_trainable_parameter_is_in_one_group_and_no_other_is():
    spec = PhaseSpec(name="p", unfreeze={"blocks": 2})
    model = prepare_phase(tiny.build("convnext"), spec)
    groups = plan_phase(model, spec, images=10).groups
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def decayed(model, spec):
    arguments = {"learning_rate": 1.0, "weight_decay": 0.1}
    groups = parameter_groups(model, dissect(model), spec, arguments)
    return {name for group in groups if group.weight_decay for name in group.names}


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_weight_decay_falls_on_matrices_and_kernels_only(family):
    changes = {"architecture": "vit_tiny_patch16_224"} if family == "timm_wrapper" else {}
    model = tiny.build(family, **changes).requires_grad_(True)
    kernels = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for kind, name in (
            (torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d, "weight"),
            (torch.nn.MultiheadAttention, "in_proj_weight"),
        )
        if isinstance(module, kind)
    }
    assert decayed(model, PhaseSpec(name="p", unfreeze="all")) == kernels & dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("architecture", "kernels", "others"),
    [
        ("mixer_s32_224", ["blocks.0.mlp_tokens.fc1.weight"], []),
        ("xcit_nano_12_p16_224", ["pos_embed.token_projection.weight"], ["blocks.0.attn.temperature"]),
        ("resmlp_12_224", ["blocks.0.linear_tokens.weight"], ["blocks.0.norm1.alpha", "blocks.0.ls1"]),
        ("levit_128s", ["stem.conv1.linear.weight"], ["stages.0.blocks.0.attn.attention_biases"]),
    ],
)
def test_weight_decay_of_timm_networks(architecture, kernels, others):
    model = tiny.build("timm_wrapper", architecture=architecture).requires_grad_(True)
    found = decayed(model, PhaseSpec(name="p", unfreeze="all"))
    names = {name.removeprefix("timm_model."): name in found for name, _ in model.named_parameters()}
    assert [names[name] for name in kernels] == [True] * len(kernels)
    assert [names[name] for name in others] == [False] * len(others)


@pytest.mark.parametrize(
    ("method", "family", "kinds"),
    [
        ("lora", "vit", {"lora_A.weight", "lora_B.weight"}),
        ("dora", "resnet", {"lora_A.weight", "lora_B.weight"}),  # whose magnitudes are (1, C, 1, 1) there
        ("ia3", "vit", set()),
        ("vera", "vit", set()),
    ],
)
def test_weight_decay_of_adapters_falls_on_their_matrices_only(method, family, kinds):
    spec = PhaseSpec(name="p", adapter=AdapterSpec(method=method, on="all"))
    found = decayed(prepare_phase(tiny.build(family), spec), spec)
    short = {re.sub(r".*\.(\w+)\.default(\.\w+)?$", r"\1\2", name) for name in found}
    assert short == kinds | {"modules_to_save.weight"}  # the head


class Product(torch.nn.Module):
    """A layer of no class of torch's, as remote code brings them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 16))
        self.scale = torch.nn.Parameter(torch.ones(16, 16))


def test_weight_decay_of_layers_of_other_classes():
    model = tiny.build("vit").requires_grad_(True)
    model.vit.layers[0].extra = Product()
    model.vit.layers[0].scale = torch.nn.Module()
    model.vit.layers[0].scale.weight = torch.nn.Parameter(torch.ones(1, 16, 1))
    found = decayed(model, PhaseSpec(name="p", unfreeze="all"))
    assert "vit.layers.0.extra.weight" in found
    assert not {"vit.layers.0.extra.scale", "vit.layers.0.scale.weight"} & found


def test_an_argument_that_transformers_refuses_names_the_phase(tmp_path):
    spec = PhaseSpec(name="deep", arguments={"lr_scheduler_type": "zigzag"})
    with pytest.raises(RecipeError, match=r"phases.deep: .*zigzag"):
        training_arguments(spec, tmp_path, seed=0, validate=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"report_to": "nonsense"},
        {"optim": "adamw_bnb_8bit"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_kwargs": {"nonsense": 1}},
    ],
    ids=str,
)
def test_what_only_a_trainer_refuses_is_refused_before_the_run(arguments):
    with pytest.raises(RecipeError, match=r"phases\.deep: "):
        try_arguments(PhaseSpec(name="deep", arguments=arguments), seed=0, validate=True)


def test_good_arguments_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "bf16": True}
    try_arguments(PhaseSpec(name="p", arguments=arguments), seed=0, validate=True)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_is_not_full_is_dropped():
    arguments = {"per_device_train_batch_size": 16, "dataloader_drop_last": True}
    assert planned("vit", images=40, arguments=arguments, unfreeze="head").steps == 2 * 3


def test_the_head_has_a_rate_of_its_own():
    plan = planned("vit", unfreeze={"blocks": 1}, head_learning_rate=0.5, arguments={"learning_rate": 0.1})
    rates = {(group.part, group.learning_rate) for group in plan.groups}
    assert rates == {("head", 0.5), ("norm", 0.1), ("block 3", 0.1)}


@pytest.mark.parametrize(
    ("gradual", "released"),
    [
        ({"blocks_per_phase": 1}, [1, 2, 3, 4, 5]),
        ({"blocks_per_phase": 2}, [2, 4, 5]),
        ({"blocks_per_phase": 2, "blocks": 4}, [2, 4]),
        ({"blocks_per_phase": 9}, [5]),
    ],
    ids=str,
)
def test_a_gradual_phase_stands_for_several(gradual, released):
    head = PhaseSpec(name="head")
    phase = PhaseSpec(name="more", gradual=GradualSpec(**gradual), layer_decay=0.5, arguments={"num_train_epochs": 1})
    first, *rest = expand_phases([head, phase], blocks=5)
    assert first == head
    assert [(one.name, one.unfreeze) for one in rest] == [
        (f"more-{number}", {"blocks": blocks}) for number, blocks in enumerate(released, start=1)
    ]
    assert all((one.gradual, one.layer_decay, one.arguments) == (None, 0.5, phase.arguments) for one in rest)


def test_a_gradual_phase_can_not_release_more_than_there_is():
    phase = PhaseSpec(name="more", gradual=GradualSpec(blocks_per_phase=1, blocks=6))
    with pytest.raises(ModelError, match=r"phases.more.gradual.blocks: asked for the last 6, but the network has 5"):
        expand_phases([phase], blocks=5)
