"""Cross-validation through the command line."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import hfft
from hfft.cli import main

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos, splits: {validation: 0.2}}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 1, disable_tqdm: true}
precision: float32
report: false
folds: 3
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
"""


@pytest.fixture
def workplace(work_with):
    return work_with(RECIPE, {"ant": 11, "bee": 11})


def test_folds(workplace, capsys):
    assert main(["train", "recipe.yaml"]) == 0
    assert "3 folds" in capsys.readouterr().out
    summary = json.loads((workplace / "runs/bugs/summary.json").read_text())
    table = pd.read_parquet(workplace / "runs/bugs/predictions.parquet")
    assert sorted(table["file"]) == sorted(
        f"{c}/{path.name}" for c in ("ant", "bee") for path in (workplace / "photos" / c).iterdir()
    )
    accuracy = summary["test"]["accuracy"]
    assert accuracy["value"] == pytest.approx((table["label"] == table["prediction"]).mean())
    by_fold = [(part["label"] == part["prediction"]).mean() for _, part in table.groupby("fold")]
    assert accuracy["mean"] == pytest.approx(sum(by_fold) / 3)
    assert accuracy["std"] == pytest.approx(pd.Series(by_fold).std())
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    for number in range(3):
        assert hfft.Run(f"runs/bugs/fold-{number}").is_finished
    assert (workplace / "runs/.replay").is_dir()
    assert not list((workplace / "runs/bugs").glob("**/.replay"))


def test_folds_that_were_interrupted_continue(workplace, capsys):
    main(["train", "recipe.yaml"])
    whole = [load_file(f"runs/bugs/fold-{n}/model/model.safetensors") for n in range(3)]
    before = (workplace / "runs/bugs/fold-0/metrics.json").stat().st_mtime_ns
    (workplace / "runs/bugs/fold-1/metrics.json").unlink()
    (workplace / "runs/bugs/summary.json").unlink()
    assert main(["train", "recipe.yaml"]) == 0
    assert (workplace / "runs/bugs/fold-0/metrics.json").stat().st_mtime_ns == before
    assert (workplace / "runs/bugs/summary.json").exists()
    for number, weights in enumerate(whole):
        again = load_file(f"runs/bugs/fold-{number}/model/model.safetensors")
        assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_run_without_folds_in_their_place(workplace, capsys):
    (workplace / "runs/bugs").mkdir(parents=True)
    (workplace / "runs/bugs/recipe.yaml").write_text("name: bugs\n")
    assert main(["train", "recipe.yaml"]) == 2
    assert "runs/bugs holds a run without folds" in capsys.readouterr().err


def test_finetune_is_one_run(workplace):
    with pytest.raises(hfft.RecipeError, match="folds: 3 are several runs"):
        hfft.finetune(hfft.load_recipe("recipe.yaml"))
