import dataclasses
from enum import Enum
from typing import Any, get_type_hints

import pytest
from transformers import TrainingArguments

from hfft.errors import RecipeError
from hfft.recipe.arguments import OWNED, argument_problem, training_argument_types
from hfft.recipe.loading import load_recipe

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
# Written down in transformers 5.23's documentation; a change of type there must be seen here.
TYPES = {
    "learning_rate": float,
    "max_steps": int,
    "bf16": bool,
    "run_name": str | None,
    "optim_args": str | None,
    "eval_steps": float | None,
}


def test_the_fields_are_those_of_the_real_class():
    assert set(training_argument_types()) == set(FIELDS)
    assert len(FIELDS) > 80


@pytest.mark.parametrize("name", sorted(TYPES))
def test_types_of_plain_fields(name):
    assert training_argument_types()[name] == TYPES[name]


def test_types_agree_with_the_real_class_or_leave_the_check_to_it():
    real = get_type_hints(TrainingArguments)
    ours = training_argument_types()
    assert {name: ours[name] for name in ours if ours[name] != real[name]} == {
        "lr_scheduler_type": str,
        "optim": str,
        "logging_strategy": str,
        "eval_strategy": str,
        "save_strategy": str,
        "hub_strategy": str,
        "parallelism_config": Any,
        "debug": Any,
    }


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_default_is_accepted_as_a_value(name):
    field = FIELDS[name]
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if name in OWNED:
        assert argument_problem(name, default) == f"hfft sets this field itself: {OWNED[name]}"
    else:
        plain = default.value if isinstance(default, Enum) else default
        assert argument_problem(name, plain) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1),
        ("num_train_epochs", 2),
        ("lr_scheduler_type", "cosine"),
        ("eval_strategy", "steps"),
        ("report_to", "none"),
        ("report_to", ["tensorboard", "wandb"]),
        ("lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("eval_steps", 10),
        ("eval_steps", None),
        ("weight_decay", 0),
        ("label_smoothing_factor", 0.1),
        ("dataloader_num_workers", 0),
        ("metric_for_best_model", "accuracy"),
        ("max_steps", -1),
        ("warmup_steps", 0.1),
        ("max_grad_norm", 0.0),
        ("optim_args", "momentum=0.9, nesterov=true"),
        ("accelerator_config", {"split_batches": False, "even_batches": True, "non_blocking": True}),
        ("accelerator_config", '{"use_seedable_sampler": false}'),
        ("use_liger_kernel", False),
        ("include_num_input_tokens_seen", False),
        ("log_level", "debug"),
        ("torch_compile_mode", "max-autotune"),
    ],
)
def test_values_as_people_write_them(name, value):
    assert argument_problem(name, value) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "1e-3", "found '1e-3'; allowed: a valid number"),
        ("learning_rate", True, "found True; allowed: a valid number"),
        ("learning_rate", None, "found None; allowed: a valid number"),
        ("learning_rate", 0.0, "found 0.0; allowed: a number above 0"),
        ("num_train_epochs", float("nan"), "found nan; allowed: a number above 0"),
        ("per_device_train_batch_size", 0, "found 0; allowed: a number above 0"),
        ("per_device_eval_batch_size", -1, "found -1; allowed: a number above 0"),
        ("gradient_accumulation_steps", 0, "found 0; allowed: a number above 0"),
        ("eval_accumulation_steps", 0, "found 0; allowed: a number above 0"),
        ("eval_steps", 0, "found 0; allowed: a number above 0"),
        ("logging_steps", 0, "found 0; allowed: a number above 0"),
        ("weight_decay", -0.1, "found -0.1; allowed: 0 or a number above it"),
        ("dataloader_num_workers", -1, "found -1; allowed: 0 or a number above it"),
        ("label_smoothing_factor", 1.5, "found 1.5; allowed: a number from 0 to 1"),
        ("max_steps", 10.0, "found 10.0; allowed: a valid integer"),
        ("bf16", 1, "found 1; allowed: a valid boolean"),
        ("lr_scheduler_type", 1, "found 1; allowed: a valid string"),
        ("lr_scheduler_kwargs", 3, "found 3; allowed: a valid dictionary or a valid string"),
        ("max_steps", 0, "found 0; allowed: a number above 0, or -1 for none"),
        ("max_steps", -2, "found -2; allowed: a number above 0, or -1 for none"),
        ("max_grad_norm", -1.0, "found -1.0; allowed: 0 or a number above it"),
        ("adam_beta1", 1.5, "found 1.5; allowed: a number from 0 to 1, without 1"),
        ("adam_epsilon", 0.0, "found 0.0; allowed: a number above 0"),
        ("eval_delay", -1, "found -1; allowed: 0 or a number above it"),
        ("save_total_limit", 0, "found 0; allowed: a number above 0"),
        ("optim_args", "momentum", "found 'momentum'; allowed: name=value, name=value"),
        ("optim_args", "a=1=2", "found 'a=1=2'; allowed: name=value, name=value"),
        ("optim_args", "momentum=0.9,lr=1", "found 'lr=1'; set learning_rate itself, which counts for each parameter"),
        ("optim", "galore_adamw", "found 'galore_adamw', which chooses its parameters itself; allowed: optimizers "),
        ("accelerator_config", {"split_batches": True}, "split_batches: found True; allowed: False, as hfft deals "),
        ("accelerator_config", {"dispatch_batches": True}, "dispatch_batches: found True; allowed: None or False, as"),
        ("accelerator_config", {"even_batches": False}, "even_batches: found False; allowed: True, as hfft deals "),
        (
            "activation_checkpointing_kwargs",
            {"every_n_layer": 2},
            "every_n_layer: unknown key; allowed: use_reentrant, ",
        ),
        ("activation_checkpointing_kwargs", {"every_n_layers": 0}, "every_n_layers: found 0; allowed: a whole number"),
        (
            "gradient_checkpointing_kwargs",
            {"use_reentrant": "no"},
            "use_reentrant: found 'no'; allowed: true or false",
        ),
        (
            "gradient_checkpointing_kwargs",
            {"determinism_check": "x"},
            "determinism_check: found 'x'; allowed: default",
        ),
        ("accelerator_config", {"splitbatches": True}, "splitbatches: unknown key; allowed: split_batches, "),
        (
            "accelerator_config",
            {"gradient_accumulation_kwargs": {"num_steps": 2}},
            "gradient_accumulation_kwargs: found {'num_steps': 2}; allowed: None or {}, as hfft deals ",
        ),
        ("accelerator_config", '{"split_batches": true}', "split_batches: found True; allowed: False, as hfft deals "),
        ("accelerator_config", "x.json", "found 'x.json'; allowed: keys with values, written here, so that "),
        ("use_liger_kernel", True, "found True; allowed: False, as it is for language models"),
        ("neftune_noise_alpha", 5.0, "found 5.0; allowed: nothing, leave it out, as it is for language models; "),
        ("eval_do_concat_batches", False, "found False; allowed: True, as the metrics are those of all "),
        ("log_level", "loud", "found 'loud'; allowed: detail, debug, info, "),
    ],
)
def test_values_that_are_refused(name, value, message):
    assert (argument_problem(name, value) or "").startswith(message)


def test_fields_that_hfft_sets_exist():
    assert set(OWNED) - set(FIELDS) <= {"local_rank"}  # which transformers 5 has dropped


@pytest.mark.parametrize("name", sorted(OWNED))
@pytest.mark.parametrize("where", ["training", "phase"])
def test_a_field_that_hfft_sets_is_refused_with_the_reason(name, where):
    training, phase = ({name: 1}, {}) if where == "training" else ({}, {name: 1})
    content = {
        "name": "x",
        "model": {"checkpoint": "c"},
        "data": {"source": "d"},
        "training": training,
        "phases": [{"name": "head", **phase}],
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(content)
    path = "training" if where == "training" else "phases.head"
    assert f"{path}.{name}: hfft sets this field itself: {OWNED[name]}" in str(caught.value)
