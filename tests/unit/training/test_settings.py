"""What a phase says to the optimizer and the schedule is what they do, or it is refused."""

from dataclasses import replace

import pytest
import tiny
import torch
import toy
from safetensors.torch import load_file
from transformers import Trainer

from hfft.errors import ModelError, RecipeError
from hfft.recipe.spec import PhaseSpec
from hfft.training.settings import (
    check_activation_checkpointing,
    end_activation_checkpointing,
    make_checkpointing_exact,
    training_arguments,
    try_arguments,
)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({}, "max"),
        ({"lr_scheduler_kwargs": {"patience": 1}}, "max"),
        ({"lr_scheduler_kwargs": '{"patience": 1}'}, "max"),
        ({"metric_for_best_model": "macro_f1"}, "max"),
        ({"metric_for_best_model": "log_loss"}, "min"),
        ({"metric_for_best_model": "eval_hamming_loss"}, "min"),
        ({"metric_for_best_model": "log_loss", "greater_is_better": True}, "max"),
    ],
    ids=str,
)
def test_a_plateau_looks_in_the_direction_of_the_metric(schedule, arguments, mode, tmp_path):
    spec = PhaseSpec(name="p", arguments={"lr_scheduler_type": schedule, **arguments})
    found = training_arguments(spec, tmp_path, seed=0, validate=True).lr_scheduler_kwargs
    assert found["mode"] == mode
    assert found.get("patience", 1) == 1


def test_the_rate_stays_while_accuracy_rises_and_falls_where_it_does_not(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.6, 0.7, 0.7, 0.7])
    measured = {"macro_f1": 0.0, "log_loss": 1.0}
    data = replace(toy.phase_data(), measure=lambda _: {"accuracy": next(accuracies), **measured})
    rates = []
    monkeypatch.setattr(
        Trainer, "log", lambda self, logs, *a: rates.append(self._get_learning_rate()) if "eval_loss" in logs else None
    )
    options = {"factor": 0.5, "patience": 0}
    arguments = {"num_train_epochs": 5, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": options}
    toy.run(tiny.build("vit"), tmp_path, data=data, unfreeze="head", arguments=arguments)
    assert rates == [1e-2, 1e-2, 1e-2, 1e-2, 5e-3]  # before the schedule has seen the evaluation


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim_args": "momentum=0.9"},
        {"optim": "sgd", "optim_args": "momentum=0.9,betas=1"},
        {"optim": "sgd", "adam_beta1": 0.5},
        {"optim": "adagrad", "adam_epsilon": 1e-3},
        {"optim": "adafactor", "optim_args": "eps=1"},
    ],
    ids=str,
)
def test_what_an_optimizer_does_not_read_is_refused(arguments):
    with pytest.raises(RecipeError, match=r"phases\.p\.(optim_args|adam_)"):
        try_arguments(PhaseSpec(name="p", arguments=arguments), seed=0, validate=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "sgd", "optim_args": "momentum=0"},  # its own default
        {"optim": "rmsprop", "optim_args": "alpha=0.9,centered=1"},
        {"optim": "adagrad", "optim_args": "lr_decay=0.1"},
        {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
        {"optim": "adamw_torch", "optim_args": ""},
    ],
    ids=str,
)
def test_what_an_optimizer_reads_passes(arguments):
    try_arguments(PhaseSpec(name="p", arguments=arguments), seed=0, validate=True)


def test_a_setting_for_phases_with_another_optimizer_passes():
    shared = {"adam_beta1": 0.5}
    spec = PhaseSpec(name="p", arguments={**shared, "optim": "sgd"}, inherited=shared)
    try_arguments(spec, seed=0, validate=True)


@pytest.mark.parametrize("warmup", [0, 500])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("polynomial", {"power": "2"}),
        ("cosine_with_min_lr", {"min_lr_rate": "x"}),
        ("reduce_lr_on_plateau", {"patience": "x"}),
    ],
)
def test_options_of_a_schedule_that_fail_in_mid_phase_are_refused(schedule, options, warmup):
    arguments = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": options, "warmup_steps": warmup}
    with pytest.raises(RecipeError, match=r"phases\.p"):
        try_arguments(PhaseSpec(name="p", arguments=arguments), seed=0, validate=True)


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", fail)
    with pytest.raises(RecipeError, match=r"phases\.p: NotImplementedError"):
        try_arguments(PhaseSpec(name="p"), seed=0, validate=True)


@pytest.mark.parametrize("asked", ["bf16", "fp16", "no", "BF16"])
def test_the_precision_is_the_recipes(monkeypatch, tmp_path, asked):
    phases = (PhaseSpec(name="a", arguments={"bf16": True}), PhaseSpec(name="b"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    found = [training_arguments(phase, tmp_path, seed=0, validate=True).mixed_precision for phase in phases]
    assert found == ["bf16", "no"]


def test_a_phase_trains_as_without_the_launchs_precision(monkeypatch, tmp_path):
    def weights(folder):
        toy.run(tiny.build("vit"), tmp_path / folder, unfreeze={"blocks": 1}, arguments={"num_train_epochs": 1})
        return load_file(next((tmp_path / folder).glob("checkpoint-*")) / "model.safetensors")

    before = weights("before")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    after = weights("after")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["vit", "swin", "siglip"])
@pytest.mark.parametrize("switch", ["activation_checkpointing", "gradient_checkpointing"])
def test_a_family_that_can(family, switch):
    network = tiny.build(family)
    check_activation_checkpointing(network, {})
    assert not network.is_activation_checkpointing
    check_activation_checkpointing(network, {switch: True})
    assert network.is_activation_checkpointing
    end_activation_checkpointing(network)
    assert not network.is_activation_checkpointing


@pytest.mark.parametrize("family", ["resnet", "convnext", "efficientnet", "levit"])
def test_a_family_that_can_not(family):
    with pytest.raises(ModelError, match=f"gradient_checkpointing: the architecture {family} can't"):
        check_activation_checkpointing(tiny.build(family), {"gradient_checkpointing": True})
    end_activation_checkpointing(tiny.build(family))


@pytest.mark.parametrize(
    ("options", "changed"),
    [(None, []), ({"use_reentrant": True, "every_n_layers": 2}, ["use_reentrant: false"])],
)
def test_checkpointing_options_that_change_a_gradient_are_set_back(options, changed, tmp_path, caplog):
    asked = {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}
    arguments = training_arguments(PhaseSpec(name="p", arguments=asked), tmp_path, seed=0, validate=False)
    with caplog.at_level("INFO", "hfft"):
        make_checkpointing_exact(arguments)
    assert arguments.activation_checkpointing_kwargs == {
        **(options or {}),
        "use_reentrant": False,
        "preserve_rng_state": True,
    }
    assert [word for record in caplog.records for word in changed if word in record.getMessage()] == changed
