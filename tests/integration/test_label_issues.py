"""Label issues of real runs: photos in the wrong class folder are listed, and nothing else."""

import json
import shutil

import pytest
import tiny

import hfft
from hfft.cli import main
from hfft.data.sources.reading import load_data

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 1, disable_tqdm: true}
precision: float32
report: false
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
"""
SPLITS = {f"{split}/{name}": 20 for split in ("train", "validation", "test") for name in ("ant", "bee", "cat")}
WRONG = {"train/bee/ant.png": ("bee", "ant"), "train/ant/cat.png": ("ant", "cat")}


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    root = photos(SPLITS)
    for split in ("train", "test"):
        shutil.move(root / split / "ant/000.png", root / split / "bee/ant.png")
        shutil.move(root / split / "cat/000.png", root / split / "ant/cat.png")
    tiny.save(tmp_path / "vit", "vit")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(workplace):
    return json.loads((workplace / "runs/bugs/label_issues.json").read_text())


def test_wrong_labels_are_listed_and_told(workplace, capsys):
    assert main(["train", "recipe.yaml", "report=true"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("label issues: ")]
    assert line.startswith("label issues: 2 of 60 training labels look wrong: ")
    found = read(workplace)
    assert (found["left_out"], found["images"], found["folds"]) == (None, 60, 5)
    assert {issue["file"]: (issue["label"], issue["believed"]) for issue in found["hints"]} == WRONG
    assert [issue["rank"] for issue in found["hints"]] == [1, 2]
    recipe = hfft.load_recipe("recipe.yaml")
    train = load_data(recipe.data, recipe.seed).splits["train"]
    for issue in found["hints"]:
        assert train[issue["row"]]["file"] == issue["file"]
        assert issue["label_probability"] < issue["believed_probability"] <= 1
        assert issue["file"] in line
    page = (workplace / "runs/bugs/report.html").read_text()
    assert "2 of 60 training labels look wrong" in page
    assert [(workplace / "runs/bugs/label_issues" / f"{n}.jpg").is_file() for n in range(3)] == [True, True, False]


def test_they_can_be_switched_off(workplace, capsys):
    assert main(["train", "recipe.yaml", "label_hints=false"]) == 0
    assert not (workplace / "runs/bugs/label_issues.json").exists()
    assert "label issues" not in capsys.readouterr().err


def test_without_recordings_they_take_a_pass_that_is_cheap_beside_the_phase(workplace):
    assert main(["train", "recipe.yaml", "replay.mode=off", "training.num_train_epochs=4"]) == 0
    assert {issue["file"] for issue in read(workplace)["hints"]} == set(WRONG)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["replay.mode=off"], "nothing was recorded (replay), and another pass over the training images would take"),
        (["phases.head.unfreeze=all"], "head, the first phase, trains more than the head"),
        (["data.max_per_class=4"], "fewer than two classes have 5 training images"),
    ],
    ids=["no-replay", "no-head", "few"],
)
def test_the_file_says_why_there_are_none(workplace, capsys, overrides, why):
    assert main(["train", "recipe.yaml", *overrides]) == 0
    found = read(workplace)
    assert found["left_out"].startswith(why)
    assert found["hints"] == []
    assert f"label issues: left out: {why}" in capsys.readouterr().err


def test_soft_labels_have_none(workplace, photos):
    lines = ["file,ant,bee"]
    lines += [
        f"photos/train/{name}/{number:03d}.png,{1 - k},{k}"
        for number in range(1, 19)
        for k, name in enumerate(("ant", "bee"))
    ]
    (workplace / "soft.csv").write_text("\n".join(lines) + "\n")
    overrides = ["data.source=soft.csv", "data.label_column=[ant, bee]", "data.image_column=file"]
    assert main(["train", "recipe.yaml", *overrides]) == 0
    assert read(workplace)["left_out"] == "an image has more than one label"
