"""Soft labels, weights, losses and samplers through the command line."""

import json

import pandas as pd
import pytest
import tiny

from hfft.cli import main

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: table.csv, splits: {validation: 0.3, test: null}}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 2, disable_tqdm: true}
precision: float32
report: false
replay: {mode: force}
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 1}, learning_rate: 1.0e-3}
"""


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    photos({"ant": 20, "bee": 6})
    tiny.save(tmp_path / "vit", "vit")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    names = [(label, n) for label, count in (("ant", 20), ("bee", 6)) for n in range(count)]
    pd.DataFrame(
        {
            "path": [f"photos/{label}/{n:03d}.png" for label, n in names],
            "label": [label for label, _ in names],
            "ant": [0.9 if label == "ant" else 0.2 for label, _ in names],
            "bee": [0.1 if label == "ant" else 0.8 for label, _ in names],
            "weight": [1 + n % 3 for _, n in names],
        }
    ).to_csv(tmp_path / "table.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.label_column=[ant, bee]"],
        ["data.weight_column=weight", "loss.name=focal"],
        ["sampler=balanced"],
        ["sampler=sqrt", "loss={name: logit_adjusted, tau: 0.5}"],
        ["class_weights=balanced", "data.weight_column=weight", "training.label_smoothing_factor=0.1"],
    ],
    ids=str,
)
def test_a_run(overrides, workplace, capsys):
    assert main(["train", "recipe.yaml", *overrides]) == 0
    metrics = json.loads((workplace / "runs/bugs/metrics.json").read_text())
    assert metrics["validation"]["accuracy"]["value"] >= 0.75  # the share of ants
    table = pd.read_parquet(workplace / "runs/bugs/predictions.parquet")
    assert [file.split("/")[1] for file in table["file"]] == list(table["label"])


BAD = [
    (["loss.name=focle"], "loss.name: found 'focle'"),
    (["loss={name: focal, tau: 1}"], "loss.tau: the loss 'focal' has none; leave it out"),
    (["loss.gamma=0"], "loss.gamma: found 0"),
    (["sampler=weighted"], "sampler: found 'weighted'"),
    (["data.label_column=[]"], "data.label_column"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[row[1] for row in BAD])
def test_bad_requests(overrides, message, workplace, capsys):
    assert main(["train", "recipe.yaml", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "runs").exists()


def test_a_run_does_not_go_on_with_other_weights(workplace, capsys):
    command = ["train", "recipe.yaml", "data.weight_column=weight"]
    assert main([*command]) == 0
    (workplace / "runs/bugs/metrics.json").unlink()
    table = pd.read_csv(workplace / "table.csv")
    table.assign(weight=table["weight"] + 1).to_csv(workplace / "table.csv", index=False)
    assert main([*command]) == 2
    assert "the images have changed since this run began" in capsys.readouterr().err
