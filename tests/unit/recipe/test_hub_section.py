import pytest
from ruamel.yaml import YAML

from hfft.errors import RecipeError
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.spec import HubSpec

LORA = {"name": "lora", "adapter": {"on": "attention"}}
APART = {"name": "lora", "adapter": {"on": "attention", "merge": False}}


def content(hub, *phases):
    entries = list(phases) or [{"name": "head"}]
    return {"name": "r", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "hub": hub, "phases": entries}


def problems(hub, *phases):
    with pytest.raises(RecipeError) as caught:
        load_recipe(content(hub, *phases))
    return str(caught.value)


def test_nothing_is_pushed_unless_asked_for():
    recipe = load_recipe({key: value for key, value in content({}).items() if key != "hub"})
    assert recipe.hub == HubSpec()
    assert recipe.hub.repo_id is None
    assert recipe.hub.private
    assert "hub" not in dump_recipe(recipe)


def test_a_section_comes_back():
    hub = {"repo_id": "me/cells", "private": False, "what": "both", "hub_strategy": "every_save", "revision": "v2"}
    recipe = load_recipe(content(hub, LORA))
    assert recipe.hub == HubSpec(**hub)
    assert load_recipe(YAML(typ="safe", pure=True).load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", ["cells", "me/cells", "my-org/vit_b16.v2", "a", "me/" + "x" * 96])
def test_names_that_the_hub_takes(name):
    assert load_recipe(content({"repo_id": name})).hub.repo_id == name


@pytest.mark.parametrize(
    "name",
    ["", "me/", "/cells", "a/b/c", "me/ce lls", "me/cell--s", "me/c..s", "-me/cells", "me/cells.git", "é", "x" * 97],
)
def test_names_that_it_does_not_take(name):
    assert f"hub.repo_id: found {name!r}; allowed: name or owner/name, of letters, digits" in problems(
        {"repo_id": name}
    )


@pytest.mark.parametrize("key", ["token", "hub_token", "hf_token", "password", "TOKEN"])
def test_a_secret_is_refused_and_not_repeated(key):
    said = problems({"repo_id": "cells", key: "hf_secret"})
    assert f"hub.{key}: a recipe never holds a secret: use `hf auth login` or HF_TOKEN, and remove this key" in said
    assert "hf_secret" not in said


def test_a_secret_is_refused_in_other_sections():
    said = problems({}, {"name": "head", "token": "hf_secret"})
    assert "phases.head.token: a recipe" in said
    assert "hf_secret" not in said


@pytest.mark.parametrize(
    ("hub", "phases", "words"),
    [
        ({"repo_id": "c", "what": "adapter"}, [], "hub.what: 'adapter' needs an adapter in the last phase"),
        ({"repo_id": "c", "what": "both"}, [], "hub.what: 'both' needs an adapter in the last phase"),
        ({"repo_id": "c", "what": "both"}, [APART], "hub.what: 'both' needs adapter.merge true in the last phase"),
        ({"repo_id": "c", "what": "model"}, [APART], "hub.what: 'model' needs adapter.merge true"),
        ({"repo_id": "c", "hub_strategy": "every_save"}, [APART], "hub.hub_strategy: 'every_save' pushes models"),
        (
            {"repo_id": "c", "hub_strategy": "every_save", "create_pr": True},
            [],
            "hub.hub_strategy: 'every_save' would open a pull request with each save",
        ),
        ({"private": False}, [], "hub.repo_id: the other keys of this section need one"),
        ({"repo_id": "c", "what": "all"}, [], "hub.what: found 'all'; allowed: 'model', 'adapter' or 'both'"),
        (
            {"repo_id": "c", "hub_strategy": "checkpoint"},
            [],
            "hub.hub_strategy: found 'checkpoint'; allowed: 'end' or",
        ),
        ({"repo_id": "c", "privat": True}, [], "hub.privat: unknown key; did you mean 'private'?"),
    ],
)
def test_contradictions(hub, phases, words):
    assert words in problems(hub, *phases)


def test_folds_are_several_runs():
    with pytest.raises(RecipeError, match=r"hub\.repo_id: folds make several runs; push the one that you want"):
        load_recipe({**content({"repo_id": "cells"}), "folds": 3})


@pytest.mark.parametrize(
    ("name", "instead"),
    [("push_to_hub", "set hub.repo_id"), ("hub_model_id", "set hub.repo_id"), ("hub_private_repo", "set hub.private")],
)
def test_the_trainer_s_own_fields_point_here(name, instead):
    with pytest.raises(RecipeError, match=rf"training.{name}: hfft sets this field itself: {instead}"):
        load_recipe({**content({}), "training": {name: "x"}})
