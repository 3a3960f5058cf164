"""Recipes made or changed in Python: what runs is what recipe.yaml says."""

from dataclasses import replace

import pytest

from hfft.errors import RecipeError
from hfft.recipe.loading import check_recipe, dump_recipe, load_recipe
from hfft.recipe.spec import DataSpec, HubSpec, ModelSpec, PhaseSpec, Recipe, SplitSpec

FILE = {
    "name": "x",
    "model": {"checkpoint": "c"},
    "data": {"source": "d"},
    "training": {"learning_rate": 0.1, "warmup_steps": 2, "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    "phases": [{"name": "head"}, {"name": "last", "unfreeze": {"blocks": 2}, "learning_rate": 0.1}],
}


@pytest.fixture
def recipe():
    return load_recipe(FILE)


@pytest.fixture
def as_file(tmp_path):
    """What recipe.yaml of a run of the recipe holds, read again."""

    def read(recipe):
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        return load_recipe(tmp_path / "recipe.yaml")

    return read


def test_other_training_arguments_reach_every_phase_that_does_not_say_otherwise(recipe, as_file):
    changed = replace(recipe, training={"learning_rate": 0.5, "weight_decay": 0.2})
    assert [phase.arguments for phase in changed.phases] == [
        {"learning_rate": 0.5, "weight_decay": 0.2},
        {"learning_rate": 0.1, "weight_decay": 0.2},  # its own, though it was the same as the old one of all
    ]
    assert changed == check_recipe(changed) == as_file(changed)


def test_phases_changed_or_taken_from_another_recipe(recipe, as_file):
    head, last = recipe.phases
    wider = replace(last, unfreeze="all", arguments={**last.arguments, "weight_decay": 0.3})
    changed = replace(recipe, phases=(wider, head), training={"learning_rate": 0.7})
    assert [(phase.unfreeze, phase.arguments) for phase in changed.phases] == [
        ("all", {"learning_rate": 0.1, "weight_decay": 0.3}),
        ("head", {"learning_rate": 0.7}),
    ]
    assert changed == check_recipe(changed) == as_file(changed)


def test_a_recipe_of_keywords(as_file):
    made = Recipe(
        name="x",
        model=ModelSpec(checkpoint="c"),
        data=DataSpec(source="d", splits=SplitSpec(validation=None)),
        phases=(PhaseSpec(name="a"), PhaseSpec(name="b", arguments={"learning_rate": 1e-3})),
        training={"learning_rate": 0.5},
    )
    assert [phase.arguments["learning_rate"] for phase in made.phases] == [0.5, 1e-3]
    assert made == check_recipe(made) == as_file(made)


def test_what_was_changed_in_place(recipe, as_file):
    recipe.training["learning_rate"] = 0.9
    recipe.phases[1].arguments["weight_decay"] = 0.4
    found = check_recipe(recipe)
    assert [phase.arguments["learning_rate"] for phase in found.phases] == [0.9, 0.1]
    assert found.phases[1].arguments["weight_decay"] == 0.4
    assert found == as_file(recipe)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"training": {"learning_rate": -1.0}}, "training.learning_rate: found -1.0"),
        ({"training": {"output_dir": "x"}}, "training.output_dir: hfft sets this field itself"),
        ({"training": {"weight_decoy": 0.1}}, "training.weight_decoy: unknown key; did you mean 'weight_decay'?"),
        ({"phases": (PhaseSpec(name="a", arguments={"seed": 1}),)}, "phases.a.seed: hfft sets this field itself"),
        ({"phases": (PhaseSpec(name="a", arguments={"unfreeze": "all"}),)}, "phases.a.arguments: found unfreeze"),
        ({"phases": (PhaseSpec(name="a", batchnorm="train"),)}, "phases.a.batchnorm"),
        ({"phases": (PhaseSpec(name="a"), PhaseSpec(name="a"))}, "phases: two phases are called 'a'"),
        ({"hub": HubSpec(create_pr=True)}, "hub.repo_id"),
        ({"data": DataSpec(source="d", splits=SplitSpec(validation=0.5, test=0.5))}, "data.splits"),
        ({"novelty": True, "data": DataSpec(source="d", splits=SplitSpec(validation=None))}, "novelty"),
    ],
)
def test_a_change_that_no_file_may_hold(recipe, changes, path):
    with pytest.raises(RecipeError) as caught:
        check_recipe(replace(recipe, **changes))
    assert path in str(caught.value)


def test_a_phase_does_not_inherit_by_a_key_of_a_file():
    with pytest.raises(RecipeError, match=r"phases\.head\.inherited: unknown key"):
        load_recipe({**FILE, "phases": [{"name": "head", "inherited": {"learning_rate": 1.0}}]})
