import pytest

from hfft.commands.sweep import plan_sweep
from hfft.errors import RecipeError

RECIPE = """
name: base
model: {checkpoint: vit}
data: {source: photos}
phases:
  - {name: head}
  - {name: last, unfreeze: {blocks: 1}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_every_combination_has_a_recipe_and_a_name(recipe):
    found = plan_sweep(
        recipe, ["training.weight_decay=0.1", "seed=0,1", "phases.last.unfreeze={blocks: 1},[],all"][:2]
    )
    assert [(r.name, r.seed, r.training) for r in found] == [
        ("base-seed-0", 0, {"weight_decay": 0.1}),
        ("base-seed-1", 1, {"weight_decay": 0.1}),
    ]
    found = plan_sweep(recipe, ["phases.last.unfreeze={blocks: 2},all", "phases.last.learning_rate=1e-3, 0.01"])
    assert [r.name for r in found] == [
        "base-unfreeze-blocks_2-learning_rate-1e-3",
        "base-unfreeze-blocks_2-learning_rate-0_01",
        "base-unfreeze-all-learning_rate-1e-3",
        "base-unfreeze-all-learning_rate-0_01",
    ]
    assert [(r.phases[1].unfreeze, r.phases[1].arguments["learning_rate"]) for r in found] == [
        ({"blocks": 2}, 1e-3),
        ({"blocks": 2}, 1e-2),
        ("all", 1e-3),
        ("all", 1e-2),
    ]


def test_commas_in_brackets_divide_nothing(recipe):
    found = plan_sweep(recipe, ["data.augment={crop: [0.5, 1.0], flip: true},{}"])
    assert [r.data.augment.crop for r in found] == [(0.5, 1.0), None]


def test_keys_of_one_name_are_told_apart(recipe):
    found = plan_sweep(recipe, ["phases.head.learning_rate=1e-2,1e-3", "phases.last.learning_rate=1e-4,1e-5"])
    assert found[0].name == "base-head_learning_rate-1e-2-last_learning_rate-1e-4"


def test_nothing_of_a_grid_is_pushed(recipe):
    recipe.write_text(RECIPE + "hub: {repo_id: me/swept}")
    with pytest.raises(RecipeError, match="push the one that you want"):
        plan_sweep(recipe, ["seed=0,1"])
    found = plan_sweep(recipe, ["seed=0,1", "hub.repo_id=null"])
    assert [r.hub.repo_id for r in found] == [None, None]


def test_a_name_of_its_own_is_the_beginning_of_all(recipe):
    assert [r.name for r in plan_sweep(recipe, ["name=other", "seed=3,4"])] == ["other-seed-3", "other-seed-4"]


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["seed=1"], "needs a key other than name with several values"),
        (["name=a,b"], "needs a key other than name with several values"),
        (["seed"], "'seed': write each key once, as key=value"),
        (["seed=0,1", "seed=2"], "'seed=2': write each key once"),
        (["seed=0,,1"], "a value is missing before or after a comma"),
        (["seed=0,1", "sead=1"], "did you mean 'seed'"),
        (["seed=0,x"], "seed: found 'x'"),
        (
            ["seed=0,1", "hub.repo_id=me/swept"],
            r"hub.repo_id: found me/swept, where the last run of a sweep .*: hfft push runs/NAME me/swept$",
        ),
        (["hub.repo_id=null,me/swept"], "leave it out"),
        (["training.weight_decay=0.1,0_1"], "two runs of the sweep would be called base-weight_decay-0_1"),
    ],
)
def test_what_is_no_grid_is_refused(assignments, words, recipe):
    with pytest.raises(RecipeError, match=words):
        plan_sweep(recipe, assignments)
