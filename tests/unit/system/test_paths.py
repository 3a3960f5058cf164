import argparse
import os

import pytest

from hfft.cli.parser import build_parser
from hfft.errors import RecipeError
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.system.files import expanded, folder_at, is_same_place

HOME = "/home/ann"


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("HOME", HOME)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("~/photos", f"{HOME}/photos"),
        ("~", HOME),
        ("./~/x", "./~/x"),
        ("a/~b", "a/~b"),
        ("owner/model", "owner/model"),
    ],
)
def test_the_users_folder(written, found):
    assert expanded(written) == found


def test_spellings_of_one_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    for spelling in ("photos/", "./photos", "~/photos", "link", "link/../photos", str(tmp_path / "photos")):
        assert is_same_place("photos", spelling), spelling
        assert folder_at(spelling) is not None
    assert not is_same_place("photos", "photos/ant")
    assert folder_at("owner/model") is None


KEYS = ["model.checkpoint", "data.source", "data.image_folder", "replay.folder", "output_dir"]


def recipe(*overrides):
    content = {"name": "r", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "phases": [{"name": "head"}]}
    return load_recipe(content, overrides)


@pytest.mark.parametrize("key", KEYS)
def test_every_path_of_a_recipe_may_begin_with_it(key):
    made = recipe(f"{key}=~/there")
    value = made
    for name in key.split("."):
        value = getattr(value, name)
    assert value == f"{HOME}/there"
    assert made == recipe(f"{key}={HOME}/there")
    assert dump_recipe(made) == dump_recipe(recipe(f"{key}={HOME}/there"))


def test_a_user_that_is_not_there_is_refused_and_a_folder_of_that_name_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="output_dir: found '~nobodyhere/runs'"):
        recipe("output_dir=~nobodyhere/runs")
    (tmp_path / "~nobodyhere").mkdir()
    assert recipe("output_dir=~nobodyhere/runs").output_dir == "~nobodyhere/runs"


def places(command):
    """All that a command line was understood as, but for the verb and its function."""
    found = vars(build_parser().parse_args(command))
    values = [value if isinstance(value, list) else [value] for name, value in found.items() if name != "run"]
    return {os.fspath(value) for row in values for value in row if isinstance(value, str | os.PathLike)}


@pytest.mark.parametrize(
    "command",
    [
        ["train", "~/x"],
        ["plan", "~/x"],
        ["check-data", "~/x"],
        ["predict", "~/x", "~/y"],
        ["predict", "m", "--top", "1", "~/x", "~/y"],
        ["predict", "m", "a", "--output=~/x"],
        ["evaluate", "~/x", "--data=~/y", "--output=~/z"],
        ["export", "~/x", "--output=~/y", "--images=~/z"],
        ["demo", "~/x", "--space=~/y"],
        ["report", "~/x"],
        ["push", "~/x", "me/r"],
        ["sweep", "~/x", "seed=0,1", "--html=~/y"],
        ["compare", "~/x", "~/y", "--html=~/z"],
    ],
)
def test_every_path_of_a_command_line_may_begin_with_it(command):
    found = places(command)
    wanted = {f"{HOME}/{word[-1]}" for word in command if word.rpartition("=")[2].startswith("~")}
    assert wanted <= found
    assert not any(value.startswith("~") for value in found)


def test_words_after_options_are_read_as_those_before():
    with pytest.raises((argparse.ArgumentTypeError, SystemExit)):
        build_parser().parse_args(["train", "r.yaml", "--nope"])
    assert [str(word) for word in build_parser().parse_args(["compare", "a", "--json", "~/b"]).runs] == [
        "a",
        f"{HOME}/b",
    ]
