"""A recipe that is chosen for images: each value has its reason, and the file repeats the run."""

import pytest
import tiny
from datasets import DatasetDict
from transformers import TrainerCallback

from hfft.cli import main
from hfft.commands.automatic import choose_recipe
from hfft.commands.finetune import finetune
from hfft.errors import DataError, HfftError, ModelError, RecipeError, RunError
from hfft.model.checkpoint import reopen
from hfft.recipe.loading import load_recipe

SPLITS = {"train/ant": 8, "train/bee": 8, "validation/ant": 2, "validation/bee": 2, "test/ant": 2, "test/bee": 2}
FAST = ("report=false", "label_hints=false")


@pytest.fixture
def place(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "vit", "vit")
    return photos(SPLITS)


def choose(source, *overrides, minutes=5, checkpoint="vit", **more):
    return choose_recipe(str(source), checkpoint=checkpoint, minutes=minutes, overrides=[*FAST, *overrides], **more)


def test_every_value_that_is_chosen_has_its_reason_beside_it(place):
    chosen = choose(place)
    lines = chosen.text.splitlines()
    assert lines[0].startswith(f"# hfft train {place} --checkpoint vit --minutes 5 report=false")
    sections = ("model:", "data:", "augment:", "training:", "phases:", "- name: ", "blocks: ")
    values = [line for line in lines[1:] if not line.strip().startswith(sections)]
    assert [line for line in values if " # " not in line] == []
    assert len(values) > 12
    assert set(chosen.seconds) == {"start", "record", "head", "evaluate", "blocks"}


def test_the_file_in_the_run_folder_repeats_the_run(place, tmp_path):
    run = finetune(choose(place))
    text = (run.folder / "recipe.yaml").read_text()
    assert "# asked for" in text
    again = finetune(load_recipe(run.folder / "recipe.yaml", ["name=again"]))
    one, other = (reopen(one.model_dir)[0].state_dict() for one in (run, again))
    assert all(one[name].equal(other[name]) for name in one)
    assert run.metrics["test"] == again.metrics["test"]
    finetune(choose(place))  # finished: nothing is chosen anew, and the comments stay
    assert (run.folder / "recipe.yaml").read_text() == text
    with pytest.raises(RunError, match="--overwrite"):
        choose(place, minutes=6)
    assert choose(place, minutes=6, overwrite=True).text != text


class Stop(TrainerCallback):
    def on_epoch_end(self, args, state, control, **more):
        if "1-last-blocks" in args.output_dir:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_the_recipe_in_its_folder(place, tmp_path):
    first = choose(place)
    with pytest.raises(KeyboardInterrupt):
        finetune(first, callbacks=[Stop()])
    again = choose(place)
    assert (again.recipe, again.text, again.seconds) == (first.recipe, first.text, {})
    run = finetune(again)
    assert run.is_finished
    assert (tmp_path / "runs/photos/recipe.yaml").read_text() == first.text


def test_what_is_asked_for_wins(place):
    chosen = choose(place, "phases.last-blocks.num_train_epochs=2", "data.augment.flip=both", "seed=3")
    assert chosen.recipe.phases[1].arguments["num_train_epochs"] == 2
    assert (chosen.recipe.data.augment.flip, chosen.recipe.seed) == ("both", 3)
    assert "num_train_epochs: 2 # asked for" in chosen.text


@pytest.mark.parametrize(
    ("images", "asked", "error"),
    [
        ({}, {}, DataError),
        ({"train/ant": 9}, {}, DataError),
        ({"ant": 2, "bee": 1}, {}, DataError),
        (SPLITS, {"minutes": 0.1}, RecipeError),
        (SPLITS, {"minutes": 0}, RecipeError),
        (SPLITS, {"checkpoint": None}, ModelError),
        (SPLITS, {"checkpoint": "owner/nothing"}, ModelError),
    ],
    ids=str,
)
def test_bad_requests_are_one_error_and_leave_nothing(tmp_path, photos, monkeypatch, images, asked, error):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "vit", "vit")
    source = photos(images)
    source.mkdir(exist_ok=True)
    with pytest.raises(error) as caught:
        choose(source, **asked)
    assert isinstance(caught.value, HfftError)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_images_on_disk_and_data_in_memory_do_not_go_together(place):
    with pytest.raises(RecipeError, match="data="):
        finetune(str(place), data=DatasetDict())


def test_options_for_images_do_not_go_with_a_recipe(tmp_path, capsys):
    assert main(["train", str(tmp_path / "r.yaml"), "--minutes", "3"]) == 2
    assert "--minutes" in capsys.readouterr().err
