"""Recipes made or changed in Python: what runs is what recipe.yaml says."""

import json
from dataclasses import MISSING, fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from hfft.errors import RecipeError
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.loading import check_recipe, dump_recipe, load_recipe, read_recipe
from hfft.recipe.spec import (
    AdapterSpec,
    DataSpec,
    GradualSpec,
    HubSpec,
    LossSpec,
    ModelSpec,
    PhaseSpec,
    Recipe,
    ReplaySpec,
    RetainSpec,
    SplitSpec,
)
from hfft.recipe.values import Fold

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


@pytest.mark.parametrize("number", [np.int64(4), np.float32(0.5), np.bool_(True), torch.tensor(0.25)])
def test_numbers_of_numpy_and_torch_are_numbers(recipe, number):
    name = {int: "per_device_train_batch_size", bool: "bf16", float: "learning_rate"}[type(number.item())]
    changed = check_recipe(replace(recipe, phases=recipe.phases[:1], training={name: number}))
    assert changed.phases[0].arguments == {name: number.item()}
    assert type(changed.training[name]) is type(number.item())


@pytest.mark.parametrize("found", ["recipe.yaml", FILE, np.zeros(2)])
def test_what_is_no_recipe_is_refused(found):
    with pytest.raises(RecipeError, match="load_recipe"):
        check_recipe(found)


def test_an_array_is_no_number(recipe):
    with pytest.raises(RecipeError):
        check_recipe(replace(recipe, training={"learning_rate": torch.zeros(2)}))


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


# A recipe with another value than the default in every field of every section.
FULL = Recipe(
    name="full",
    model=ModelSpec(
        checkpoint="c", revision="r", image_size=64, head="normal", memory_format="contiguous", trust_remote_code=True
    ),
    data=DataSpec(
        source="d",
        config="c",
        revision="r",
        task="single_label",
        image_folder="f",
        image_column="i",
        label_column="l",
        weight_column="w",
        split_column="s",
        group_column="g",
        max_per_class=5,
        splits=SplitSpec(train="t", validation=0.25, test=Fold(fold=1, of=4)),
        augment=AugmentSpec(
            crop=(0.5, 0.75), flip="both", rotate90=True, randaugment=9, color=0.5, erasing=0.5, mixup=0.5, cutmix=0.5
        ),
        fit="letterbox",
        background="gray",
        bad_images="stop",
        audit="quick",
        leaks="stop",
    ),
    phases=(
        PhaseSpec(
            name="head", solver="steps", head_learning_rate=0.5, early_stopping=2, arguments={"weight_decay": 0.5}
        ),
        PhaseSpec(name="more", gradual=GradualSpec(blocks_per_phase=2, blocks=4)),
        PhaseSpec(
            name="deep", unfreeze={"blocks": "first 2"}, layer_decay=0.75, batchnorm="train", average={"last": 2}
        ),
        PhaseSpec(
            name="lora",
            adapter=AdapterSpec(method="dora", on="all", blocks=2, r=4, lora_alpha=4, lora_dropout=0.25, merge=False),
        ),
    ),
    training={"learning_rate": 0.25},
    class_weights={"ant": 2.0},
    loss=LossSpec(name="focal", gamma=2.0),
    sampler="sqrt",
    precision="bfloat16",
    replay=ReplaySpec(mode="force", views=3, budget="1GB", folder="f", engine="torch", dtype="float16"),
    license="mit",
    widget=3,
    hub=HubSpec(repo_id="a/b", private=False, what="adapter", revision="r", commit_message="m", base_model="a/c"),
    keep="last",
    retain=RetainSpec(measure=False),
    novelty=True,
    label_hints=False,
    report=False,
    seed=7,
    output_dir="o",
)
# What contradicts the rest; in recipes of their own.
OTHERS = {
    "folds": replace(FULL, folds=4, data=replace(FULL.data, splits=SplitSpec()), hub=HubSpec()),
    "create_pr": replace(FULL, hub=replace(FULL.hub, create_pr=True)),
    "hub_strategy": replace(FULL, hub=HubSpec(repo_id="a/b", hub_strategy="every_save"), phases=FULL.phases[:3]),
    "tau": replace(FULL, loss=LossSpec(name="logit_adjusted", tau=2.0)),
    "trivialaugment": replace(FULL, data=replace(FULL.data, augment=AugmentSpec(trivialaugment=True))),
    "augmix": replace(FULL, data=replace(FULL.data, augment=AugmentSpec(augmix=2))),
    "interpolate": replace(FULL, retain=RetainSpec(interpolate=0.0), phases=FULL.phases[:3], hub=HubSpec()),
}


@pytest.mark.parametrize("made", [FULL, *OTHERS.values()], ids=["full", *OTHERS])
def test_every_field_is_what_the_file_says(made, as_file):
    assert made == check_recipe(made) == as_file(made)


def sections_of(value):
    """The dataclasses of a recipe, at any depth."""
    if is_dataclass(value):
        yield value
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, tuple):
        for part in value:
            yield from sections_of(part)


def test_no_field_is_left_out():
    sections = list(sections_of(FULL))
    changed = {
        (type(section).__name__, field.name)
        for section in sections
        for field in fields(section)
        if field.default is MISSING or getattr(section, field.name) != field.default
    }
    every = {(type(section).__name__, field.name) for section in sections for field in fields(section)}
    assert {name for _, name in every - changed} == set(OTHERS)


def test_the_recipe_of_an_older_run_may_hold_what_is_refused_today(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**FILE, "training": {"eval_steps": 5, "max_steps": 0, "use_cache": True}}))
    with pytest.raises(RecipeError, match="3 problems"):
        load_recipe(path)
    assert read_recipe(path).training == {"eval_steps": 5, "max_steps": 0, "use_cache": True}
    for text in ("- 1", json.dumps({**FILE, "nmae": 1})):
        path.write_text(text)
        with pytest.raises(RecipeError, match="1 problem"):
            read_recipe(path)
