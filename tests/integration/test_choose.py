"""`hfft choose`: checkpoints side by side, on recordings that the run which follows goes on with."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from pictures import THREE_CLASSES, make_photos

import hfft
from hfft.cli import main
from hfft.errors import DataError, ModelError, RecipeError
from hfft.recipe.loading import load_recipe

SCRIPT = Path(__file__).parents[2] / "scripts/prepare_quickstart.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choose")
    make_photos(folder / "photos", dict.fromkeys(THREE_CLASSES, 20))
    for family in ("vit", "convnext"):
        tiny.save(folder / family, family)
    (folder / "vit/README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    return folder


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch):
    monkeypatch.chdir(home)


def test_the_best_comes_first_and_what_cannot_be_opened_last(capsys):
    code = main(["choose", "photos", "none/here", "convnext", "data.audit=quick", "vit", "--output", "choice.json"])
    assert code == 0
    out = capsys.readouterr().out
    found = json.loads(Path("choice.json").read_text())
    assert found["images"] == {"train": 42, "validation": 9, "test": 9}
    *works, broken = found["candidates"]
    assert {one["checkpoint"] for one in works} == {"vit", "convnext"}
    values = [one["probe"]["accuracy"]["value"] for one in works]
    assert values == sorted(values, reverse=True)
    assert min(values) > 0.9  # one hue per class
    assert works[0]["difference"] is None
    gap = works[1]["difference"]
    assert gap["value"] == pytest.approx(values[0] - values[1])
    assert gap["low"] <= gap["value"] <= gap["high"]
    for one in works:
        interval = one["probe"]["balanced_accuracy"]
        assert interval["low"] <= interval["value"] <= interval["high"]
        assert one["neighbours"]["accuracy"]["value"] > 0.5
        assert one["images_per_second"] > 0
        assert one["image_size"] == [tiny.SIDE, tiny.SIDE]
    assert {one["checkpoint"]: one["license"] for one in works} == {"vit": "apache-2.0", "convnext": "unknown"}
    assert broken["checkpoint"] == "none/here"
    assert "none/here" in broken["problem"]
    assert "not measured: none/here" in out
    assert out.index("vit ") < out.index("not measured")


def test_the_run_that_follows_computes_no_features_again(home, caplog):
    shutil.rmtree(home / "runs", ignore_errors=True)
    choice = hfft.choose("photos", ["vit"])
    assert choice.best == "vit"
    assert not [path for path in (home / "runs").iterdir() if path.name != ".replay"]  # no run of its own
    before = {path: path.stat().st_mtime_ns for path in (home / "runs/.replay").rglob("*.safetensors")}
    assert len(before) >= 2  # training and validation images
    caplog.set_level("INFO", "hfft")
    recipe = {
        "name": "after",
        "model": {"checkpoint": "vit"},
        "data": {"source": "photos"},
        "report": False,
        "label_hints": False,
        "phases": [{"name": "head", "unfreeze": "head", "learning_rate": 1e-2, "num_train_epochs": 1}],
    }
    hfft.finetune(load_recipe(recipe))
    assert any("recorded before" in record.getMessage() for record in caplog.records)
    after = {path: path.stat().st_mtime_ns for path in (home / "runs/.replay").rglob("*.safetensors")}
    assert after == before


def test_without_replay_the_numbers_are_the_same():
    recorded = hfft.choose("photos", ["vit"], ["precision=float32"]).candidates[0]
    computed = hfft.choose("photos", ["vit"], ["precision=float32", "replay.mode=off"]).candidates[0]
    assert computed.probe["accuracy"] == recorded.probe["accuracy"]
    assert computed.probe["log_loss"]["value"] == pytest.approx(recorded.probe["log_loss"]["value"], rel=1e-2)


def test_images_with_any_number_of_labels(home):
    rows = [f"photos/ant/{n:03d}.png,1,0" for n in range(20)] + [f"photos/bee/{n:03d}.png,0,1" for n in range(20)]
    Path("labels.csv").write_text("\n".join(["file,red,green", *rows]) + "\n")
    found = hfft.choose("labels.csv", ["vit"], ["data.label_column=[red, green]", "data.task=multi_label"])
    assert found.metric == "mean_average_precision"
    assert found.candidates[0].probe[found.metric]["value"] > 0.9


def test_bad_requests_are_one_error_each(home, capsys):
    (home / "empty").mkdir(exist_ok=True)
    make_photos(home / "alone", {"ant": 6})
    with pytest.raises(DataError, match="empty"):
        hfft.choose("empty", ["vit"])
    with pytest.raises(DataError, match="ant"):
        hfft.choose("alone", ["vit"])
    with pytest.raises(DataError, match="validation"):
        hfft.choose("photos", ["vit"], ["data.splits.validation=null"])
    with pytest.raises(RecipeError, match=r"data\.source"):
        hfft.choose("photos", ["vit"], ["data.source=other"])
    with pytest.raises(ModelError, match=r"none/here(.|\n)*none/there"):
        hfft.choose("photos", ["none/here", "none/there"], ["data.audit=off"])
    assert main(["choose", "photos", "data.audit=off"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_efficientnets_from_packages(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("prepare_quickstart", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["prepare_quickstart"] = script
    spec.loader.exec_module(script)
    folders = [str(tmp_path / f"lite{number}") for number in (0, 1, 2)]
    for number, folder in enumerate(folders):
        script.prepare_checkpoint(Path(folder), number)
    assert main(["choose", "photos", *folders, "--json", "data.audit=off", f"output_dir={tmp_path}"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {one["checkpoint"]: (one["image_size"], one["parameters"]) for one in found["candidates"]}
    assert [sizes[folder][0] for folder in folders] == [[224, 224], [240, 240], [260, 260]]
    assert sizes[folders[0]][1] < sizes[folders[1]][1] < sizes[folders[2]][1]
    assert all(one["probe"]["accuracy"]["value"] > 0.9 for one in found["candidates"])
