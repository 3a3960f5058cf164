"""The real command line, from a folder of photos to a model that `pipeline()` opens in a fresh process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from datasets import Dataset, DatasetDict, Features, Image, Value
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback

import hfft
from hfft.cli import main

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos, augment: {crop: [0.6, 1.0], flip: true}}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 2, disable_tqdm: true}
precision: float32
report: false
keep: last
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 2}, learning_rate: 1.0e-3}
  - {name: lora, adapter: {on: attention}, learning_rate: 1.0e-3}
"""
PIPELINE = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1])
print(json.dumps([classify(path, top_k=None) for path in sys.argv[2:]]))
"""
SPLITS = {
    **{f"train/{name}": 10 for name in ("ant", "bee", "cat")},
    **{f"validation/{name}": 3 for name in ("ant", "bee", "cat")},
    **{f"test/{name}": 4 for name in ("ant", "bee", "cat")},
}


@pytest.fixture
def workplace(work_with):
    return work_with(RECIPE, SPLITS)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_from_start_to_use(workplace, capsys):
    Path("recipe.yaml").write_text(RECIPE.replace("report: false", "report: true"))
    assert main(["plan", "recipe.yaml"]) == 0
    planned = capsys.readouterr().out
    assert "30 train, 9 validation, 12 test images, 3 classes: ant, bee, cat" in planned
    assert "trains blocks 2-3 of 4, norm, head" in planned
    assert not (workplace / "runs").exists()

    assert main(["train", "recipe.yaml"]) == 0
    shown = capsys.readouterr()
    assert "phase 3/3 lora: epoch 2 of 2" in shown.err
    run = hfft.Run("runs/bugs")
    assert {path.name for path in run.folder.iterdir()} == {
        *(
            "0-head",
            "1-last",
            "2-lora",
            "adapter",
            "data.json",
            "environment.json",
            "figures",
            "label_issues.json",
            "metrics.json",
            "model",
        ),
        *("mistakes", "predictions.parquet", "recipe.yaml", "report.html"),
    }
    assert (run.folder / "figures/first_batch.png").read_bytes().startswith(b"\x89PNG")
    assert "The first training images" in (run.folder / "report.html").read_text()
    assert shown.err.count("report: runs/bugs/report.html\n") == 1
    assert run.recipe == hfft.load_recipe("recipe.yaml")
    for number, (name, changed) in enumerate((("head", 0), ("last", 0), ("lora", 0))):
        result = json.loads((run.phase_dir(number) / "result.json").read_text())
        assert (run.phase_dir(number).name, result["frozen"]["changed"]) == (f"{number}-{name}", changed)
        assert result["frozen"]["tensors"] > 30
    accuracy = run.metrics["test"]["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert f"{accuracy['value']:.4f}" in shown.out
    assert json.loads((run.folder / "data.json").read_text())["splits"]["train"]["counts"] == dict.fromkeys(
        ("ant", "bee", "cat"), 10
    )
    assert not list(run.model_dir.glob("*.bin"))

    before = weights(run.folder)
    assert main(["train", "recipe.yaml"]) == 0  # finished: nothing happens
    assert "is finished" in capsys.readouterr().err

    table = run.predictions
    tested = table[table["split"] == "test"]
    assert main(["evaluate", "runs/bugs", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["images"], again["metrics"]) == (12, run.metrics["test"])
    assert again["details"] == run.metrics["details"]["test"]
    assert main(["predict", "runs/bugs", "photos/test", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_file = {line["file"].removeprefix("photos/"): (line["label"], line["probability"]) for line in lines}
    for row in tested.itertuples():
        assert by_file[row.file] == (row.prediction, pytest.approx(row.probability, abs=1e-6))

    assert main(["train", "recipe.yaml", "--overwrite"]) == 0  # the same again, to the bit
    assert all(torch.equal(before[name], value) for name, value in weights(run.folder).items())


def test_a_fresh_process_gets_the_predictions_that_were_reported(workplace):
    """Promise 4: labels, preprocessing and probabilities of predictions.parquet, through transformers alone."""
    recipe = hfft.load_recipe("recipe.yaml", ["training.max_steps=2"])
    run = hfft.finetune(recipe)
    table = run.predictions[lambda all_rows: all_rows["split"] == "test"]
    files = [str(workplace / "photos" / file) for file in table["file"]]
    command = [sys.executable, "-c", PIPELINE, str(run.model_dir), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == len(table) == 12
    for answer, row in zip(answers, table.to_dict("records"), strict=True):
        assert answer[0]["label"] == row["prediction"]
        for entry in answer:
            assert entry["score"] == pytest.approx(row[f"probability {entry['label']}"], abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights(workplace):
    """Stopped once in each of the phases, and started again each time."""
    longer = ["training.num_train_epochs=4", "training.dataloader_num_workers=2"]
    command = [sys.executable, "-m", "hfft", "train", "recipe.yaml", *longer]
    assert warm.run([*command, "name=whole"]).returncode == 0
    for phase, stop in (("0-head", signal.SIGKILL), ("1-last", signal.SIGINT), ("2-lora", signal.SIGKILL)):
        process = warm.Popen([*command, "name=parts"], stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list(Path("runs/parts").glob(f"{phase}/checkpoint-*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        os.killpg(process.pid, stop)  # as a terminal does: data loader workers get it too
        said = process.communicate()[1]
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert "Traceback" not in said
        assert ("continues with the same command" in said) == (stop == signal.SIGINT)
        assert not Path("runs/parts/metrics.json").exists()
    done = warm.run([*command, "name=parts"])
    assert done.returncode == 0, done.stderr
    assert "phase 1/3 head: was finished" in done.stderr
    whole, parts = (weights(Path("runs") / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    tables = [pd.read_parquet(f"runs/{name}/predictions.parquet") for name in ("whole", "parts")]
    assert tables[0].equals(tables[1])


def test_changed_images_are_not_mixed_into_a_run_that_began_with_others(workplace, capsys):
    assert main(["train", "recipe.yaml", "training.max_steps=1"]) == 0
    Path("runs/bugs/metrics.json").unlink()  # as if it had been stopped before the end
    Path("photos/train/ant/000.png").write_bytes(Path("photos/train/ant/001.png").read_bytes())
    assert main(["train", "recipe.yaml", "training.max_steps=1"]) == 2
    assert "the images have changed since this run began; --overwrite starts the run anew" in capsys.readouterr().err


def test_an_adapter_that_stays_apart_is_the_result(workplace, capsys):
    apart = ["phases.lora.adapter={merge: false}", "training.max_steps=2"]
    assert main(["train", "recipe.yaml", *apart]) == 0
    run = hfft.Run("runs/bugs")
    assert run.model_dir == Path("runs/bugs/adapter")
    assert not (run.folder / "model").exists()
    assert (run.model_dir / "README.md").is_file()
    capsys.readouterr()
    assert main(["evaluate", "runs/bugs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == run.metrics["test"]
    merged = hfft.finetune(hfft.load_recipe("recipe.yaml", ["training.max_steps=2", "name=merged"]))
    columns = ["probability ant", "probability bee", "probability cat"]
    np.testing.assert_allclose(run.predictions[columns], merged.predictions[columns], atol=1e-5)


def test_evaluate_refuses_images_that_may_have_been_trained_on(workplace, capsys, photos):
    carved = ["data.source=mixed", "training.max_steps=1"]
    photos(dict.fromkeys(("ant", "bee", "cat"), 20), name="mixed")
    assert main(["train", "recipe.yaml", *carved]) == 0
    Path("mixed/ant/000.png").rename("mixed/ant/zzz.png")
    assert main(["evaluate", "runs/bugs"]) == 2
    assert "the test images of mixed aren't those of the run any more" in capsys.readouterr().err


def test_a_gradual_phase_runs_as_the_phases_that_it_stands_for(workplace, capsys):
    more = "  - {name: more, gradual: {blocks_per_phase: 3}, head_learning_rate: 1.0e-2, learning_rate: 1.0e-3}\n"
    Path("gradual.yaml").write_text(RECIPE.partition("  - {name: last")[0] + more)
    command = ["train", "gradual.yaml", "training.max_steps=2", "class_weights=balanced"]
    assert main(command) == 0
    run = hfft.Run("runs/bugs")
    assert [(phase.name, phase.unfreeze) for phase in run.recipe.phases] == [
        ("head", "head"),
        ("more-1", {"blocks": 3}),
        ("more-2", {"blocks": 4}),
    ]
    assert all((run.phase_dir(number) / "result.json").is_file() for number in range(3))
    assert main(command) == 0
    assert main(["train", "runs/bugs/recipe.yaml"]) == 0  # what was resolved is the same run
    assert capsys.readouterr().err.count("is finished") == 2


@pytest.mark.parametrize("before", [[], ["last"], ["last", "lora"]], ids=["head", "blocks", "adapter"])
def test_the_adapter_folder_is_complete_wherever_it_is_opened(before, workplace, monkeypatch):
    """After a head phase it sits on the checkpoint; after other phases on weights that only the run has."""
    content = YAML(typ="safe").load(RECIPE)
    phases = [phase for phase in content["phases"] if phase["name"] in ("head", *before)]
    more = {"name": "more", "adapter": {"on": "mlp"}, "learning_rate": 0.05}
    run = hfft.finetune(hfft.load_recipe({**content, "phases": [*phases, more]}, ["training.max_steps=2"]))
    folder, image = run.folder.resolve(), Path("photos/test/ant/000.png").resolve()
    monkeypatch.chdir("/")
    adapted, merged = (hfft.Classifier.from_pretrained(folder / name)([image], top=3) for name in ("adapter", "model"))
    assert adapted[0].top == pytest.approx(merged[0].top, abs=1e-5)


def test_finetune_takes_data_a_model_and_callbacks_from_memory(workplace):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            Count.steps += 1

    def rows(split, count):
        paths = [f"photos/{split}/{label}/{k:03d}.png" for label in ("ant", "bee", "cat") for k in range(count)]
        features = Features({"picture": Image(), "class": Value("string")})
        return Dataset.from_dict({"picture": paths, "class": [Path(p).parent.name for p in paths]}, features=features)

    data = DatasetDict({"train": rows("train", 10), "test": rows("test", 4)})
    model = AutoModelForImageClassification.from_pretrained("vit", num_labels=3, ignore_mismatched_sizes=True)
    recipe = hfft.load_recipe("recipe.yaml", ["training.max_steps=2", "data.splits.validation=null"])
    run = hfft.finetune(recipe, data=data, model=model, callbacks=[Count()])
    assert Count.steps == 6
    assert set(run.metrics) == {
        *(
            "test",
            "by_class",
            "confusion",
            "details",
            "calibration",
            "examples",
            "kept",
            "baselines",
            "retention",
            "seconds",
        )
    }
    assert "fine-tuned from a model in memory on images in memory" in (run.model_dir / "README.md").read_text()
    assert len(run.predictions) == 12
    assert hfft.Classifier.from_pretrained(run.model_dir).classes == ("ant", "bee", "cat")


def test_evaluate_on_new_images_maps_labels_by_name(workplace, capsys, photos):
    assert main(["train", "recipe.yaml", "training.max_steps=1"]) == 0
    photos({"bee": 5, "cat": 2}, name="new")
    capsys.readouterr()
    assert main(["evaluate", "runs/bugs/model", "--data", "new", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {name: row["images"] for name, row in scores["by_class"].items()} == {"ant": 0, "bee": 5, "cat": 2}
