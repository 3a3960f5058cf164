"""Fields that count beside others only: said where they count in no phase, and nowhere else."""

import pytest

from hfft.errors import RecipeError
from hfft.recipe.loading import load_recipe
from hfft.training.precision import phases_in

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau"}
GREEDY = {"lr_scheduler_type": "greedy", "learning_rate": 1e-2}


def problems(training, *phases):
    content = {"name": "x", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "training": training}
    named = [{"name": name, **phase} for name, phase in zip("ab", phases or ({},), strict=False)]
    try:
        load_recipe({**content, "phases": named})
    except RecipeError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("training", "beside"),
    [
        ({"eval_steps": 5}, {"eval_strategy": "steps"}),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}),
        ({"warmup_steps": 0.1, **PLATEAU}, {"lr_scheduler_type": "cosine"}),
        (
            {"lr_scheduler_kwargs": {"power": 2.0}, "lr_scheduler_type": "constant"},
            {"lr_scheduler_type": "polynomial"},
        ),
        ({"activation_checkpointing_kwargs": {"use_reentrant": False}}, {"activation_checkpointing": True}),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {"gradient_checkpointing": True}),
        ({"dataloader_multiprocessing_context": "spawn", "dataloader_num_workers": 0}, {"dataloader_num_workers": 1}),
        ({"project": "mine"}, {"report_to": "trackio"}),
        ({"trackio_space_id": "me/it"}, {"report_to": ["wandb", "trackio"]}),
    ],
    ids=str,
)
def test_a_field_that_counts_in_no_phase_is_told_once(training, beside):
    field = next(iter(training))
    (line,) = problems(training)
    assert line.startswith(f"training.{field}: counts with ")
    (line,) = problems(training, {}, {})
    assert line.startswith(f"training.{field}: counts with ")
    (line,) = problems({}, {}, training)
    assert line.startswith(f"phases.b.{field}: counts with ")
    assert problems({**training, **beside}) == []
    assert problems(training, {}, beside) == []  # the other phase needs it


@pytest.mark.parametrize(
    "training",
    [
        {"eval_steps": None},
        {"warmup_steps": 0, "lr_scheduler_type": "constant"},
        {"lr_scheduler_kwargs": {}, "lr_scheduler_type": "constant"},
        {"project": "huggingface"},
        {"dataloader_prefetch_factor": 2},
    ],
    ids=str,
)
def test_what_asks_for_nothing_passes(training):
    assert problems(training) == []


@pytest.mark.parametrize(
    ("training", "wrong"),
    [
        ({**PLATEAU, "lr_scheduler_kwargs": {"mode": "min"}}, True),
        ({**PLATEAU, "lr_scheduler_kwargs": '{"mode": "min"}'}, True),
        ({**PLATEAU, "lr_scheduler_kwargs": {"mode": "max"}}, False),
        ({**PLATEAU, "lr_scheduler_kwargs": {"mode": "max"}, "metric_for_best_model": "log_loss"}, True),
        ({**PLATEAU, "lr_scheduler_kwargs": {"mode": "min"}, "metric_for_best_model": "eval_log_loss"}, False),
        ({**PLATEAU, "lr_scheduler_kwargs": {"mode": "min"}, "greater_is_better": False}, False),
        ({**GREEDY, "lr_scheduler_kwargs": {"mode": "min"}}, True),
    ],
    ids=str,
)
def test_the_mode_of_a_plateau_is_the_metrics_direction(training, wrong):
    found = problems(training)
    assert [line.split(":")[0] for line in found] == (["phases.a.lr_scheduler_kwargs.mode"] if wrong else [])


def test_a_greedy_rate_must_be_able_to_fall():
    (line,) = problems({**GREEDY, "learning_rate": 5e-5})
    assert line.startswith("phases.a.lr_scheduler_kwargs.min_lr: the learning rate 5e-05 could never fall")
    assert problems({**GREEDY, "learning_rate": 5e-5, "lr_scheduler_kwargs": {"min_lr": 1e-7}}) == []
    assert problems(GREEDY) == []


SOLVED = {"solver": "lbfgs"}


@pytest.mark.parametrize(
    ("changes", "phase", "words"),
    [
        ({}, {"unfreeze": "all"}, "the head alone"),
        ({}, {"adapter": {}}, "the head alone"),
        ({}, {"learning_rate": 0.1, "num_train_epochs": 2}, "no steps, which learning_rate, num_train_epochs are"),
        ({}, {"early_stopping": 2, "head_learning_rate": 0.1}, "which early_stopping, head_learning_rate are"),
        ({"replay": {"mode": "off"}}, {}, "replay.mode"),
        ({"loss": {"name": "focal"}}, {}, "convex"),
        ({"data": {"source": "d", "augment": {"mixup": 0.2}}}, {}, "mixup 0"),
        ({"data": {"source": "d", "group_column": "g", "splits": {"validation": None}}}, {}, "data.splits.validation"),
    ],
    ids=str,
)
def test_a_head_that_can_not_be_solved(changes, phase, words):
    content = {"name": "x", "model": {"checkpoint": "c"}, "data": {"source": "d"}, **changes}
    with pytest.raises(RecipeError, match=f"phases.a.solver: lbfgs .*{words}"):
        load_recipe({**content, "phases": [{"name": "a", **SOLVED, **phase}]})
    recipe = load_recipe({**content, "phases": [{"name": "a", **phase}]})  # `auto` takes steps
    assert phases_in(recipe, "float32")[0].is_solved is False


def test_a_head_is_solved_where_nothing_says_how_to_take_steps():
    others = {"per_device_train_batch_size": 4, "label_smoothing_factor": 0.1, "metric_for_best_model": "log_loss"}
    content = {"name": "x", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "training": others}
    phases = [
        {"name": "a"},
        {"name": "b", "solver": "steps"},
        {"name": "c", **SOLVED},
        {"name": "d", "adapter": {}},
    ]
    found = load_recipe({**content, "phases": phases})
    assert [phase.is_solved for phase in phases_in(found, "bfloat16")] == [True, False, True, False]
    shared = load_recipe({**content, "training": {"learning_rate": 0.1}, "phases": phases})
    assert [phase.is_solved for phase in phases_in(shared, "float32")] == [False, False, True, False]
