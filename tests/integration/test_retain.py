"""Retention, interpolation and confidence in whole runs, through the real command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import hfft
from hfft.cli import main
from hfft.evaluators.weight_interpolation import ALPHAS

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 2, disable_tqdm: true}
precision: float32
report: false
replay: {mode: "off"}
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 2}, learning_rate: 1.0e-2, metric_for_best_model: log_loss}
  - {name: lora, adapter: {on: attention}, learning_rate: 1.0e-2}
"""
SPLITS = {
    **{f"train/{name}": 10 for name in ("ant", "bee", "cat")},
    **{f"validation/{name}": 6 for name in ("ant", "bee", "cat")},
    **{f"test/{name}": 4 for name in ("ant", "bee", "cat")},
}


@pytest.fixture
def workplace(work_with):
    return work_with(RECIPE, SPLITS)


def weights(folder):
    return load_file(folder / "model.safetensors")


def without_seconds(metrics):
    return {key: value for key, value in metrics.items() if key != "seconds"}


def test_each_phase_says_what_is_left_of_the_old_task(workplace, capsys):
    assert main(["train", "recipe.yaml"]) == 0
    said = capsys.readouterr().err
    assert "phase 1/3 head: the encoder is the pretrained one" in said
    assert "phase 2/3 last: the checkpoint's own head answers the same to" in said
    run = hfft.Run("runs/bugs")
    files = [json.loads((run.phase_dir(number) / "retention.json").read_text()) for number in range(3)]
    blocks = [f"block {number}" for number in range(4)]
    assert files[0]["changed"] == []
    assert files[1]["changed"] == ["block 2", "block 3", "norm"]
    assert files[2]["changed"] == [*blocks, "norm"]  # the adapter counts, merged
    for found, moved in zip(files, (0, 2, 4), strict=True):
        drifts = [found["blocks"][block]["cosine_drift"] for block in blocks]
        assert [drift > 0 for drift in drifts] == [False] * (4 - moved) + [True] * moved
    phases = run.metrics["retention"]["phases"]
    assert list(phases) == ["head", "last", "lora"]
    assert [phases[name]["old_task"] for name in phases] == [found["old_task"] for found in files]
    assert run.metrics["retention"]["sample"] == {"split": "validation", "images": 18}
    assert phases["head"]["old_task"] == {"classes": 10, "agreement": 1, "kl_divergence": 0}
    assert phases["lora"]["old_task"]["kl_divergence"] > 0

    before = run.metrics  # killed before its end, it reads what it has and computes the rest again
    (run.folder / "metrics.json").unlink()
    (run.phase_dir(2) / "retention.json").unlink()
    assert main(["train", "recipe.yaml"]) == 0
    assert without_seconds(run.metrics) == without_seconds(before)


def test_measuring_changes_no_weight_and_can_be_switched_off(workplace):
    on = hfft.finetune(hfft.load_recipe("recipe.yaml", ["name=on"]))
    off = hfft.finetune(hfft.load_recipe("recipe.yaml", ["name=off", "retain.measure=false"]))
    assert "retention" not in off.metrics
    assert not list(off.folder.rglob("retention.json"))
    assert all(torch.equal(value, weights(off.model_dir)[name]) for name, value in weights(on.model_dir).items())
    assert {split: on.metrics[split] for split in ("validation", "test")} == {
        split: off.metrics[split] for split in ("validation", "test")
    }


def test_an_interpolated_result_is_what_is_saved_and_scored(workplace, capsys):
    plain = hfft.finetune(hfft.load_recipe("recipe.yaml", ["name=plain", "keep=last"]))
    assert main(["train", "recipe.yaml", "name=mixed", "retain.interpolate=auto"]) == 0
    assert "of the way from the head phase to the end" in capsys.readouterr().err
    run = hfft.Run("runs/mixed")
    found = run.metrics["interpolation"]
    assert [point["alpha"] for point in found["curve"]] == list(ALPHAS)
    assert (found["metric"], found["images"]) == ("accuracy", 18)
    best = max(point["accuracy"] for point in found["curve"])
    assert found["alpha"] == next(point["alpha"] for point in found["curve"] if point["accuracy"] == best)
    assert run.metrics["validation"]["accuracy"]["value"] == pytest.approx(best)
    ends = weights(next((run.folder / "0-head").glob("checkpoint-*"))), weights(plain.model_dir)
    for name, value in weights(run.model_dir).items():
        torch.testing.assert_close(value, torch.lerp(ends[0][name], ends[1][name], found["alpha"]))
    assert "interpolated" in run.metrics["retention"]["phases"]

    before = run.metrics
    (run.folder / "metrics.json").unlink()
    assert main(["train", "recipe.yaml", "name=mixed", "retain.interpolate=auto"]) == 0
    assert without_seconds(run.metrics) == without_seconds(before)


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_a_given_share_of_the_way(workplace, alpha):
    plain = hfft.finetune(hfft.load_recipe("recipe.yaml", ["name=plain", "keep=last"]))
    run = hfft.finetune(hfft.load_recipe("recipe.yaml", ["name=mixed", f"retain.interpolate={alpha}"]))
    ends = weights(next((run.folder / "0-head").glob("checkpoint-*"))), weights(plain.model_dir)
    for name, value in weights(run.model_dir).items():
        torch.testing.assert_close(value, torch.lerp(ends[0][name], ends[1][name], float(alpha)))
    assert run.metrics["interpolation"] == {"alpha": alpha, "metric": None, "images": 0, "curve": []}
    phases = run.metrics["retention"]["phases"]
    drifts = {name: phase["head_input"]["cosine_drift"] for name, phase in phases.items()}
    assert drifts["interpolated"] == 0 if alpha == 0 else 0 < drifts["interpolated"] < drifts["lora"]


def test_confidence_is_kept_with_the_model_and_pipeline_takes_no_notice(workplace, capsys):
    assert main(["train", "recipe.yaml"]) == 0
    run = hfft.Run("runs/bugs")
    confidence = run.metrics["confidence"]
    config = json.loads((run.model_dir / "config.json").read_text())
    assert config["hfft"]["temperature"] == confidence["temperature"]
    assert set(config["hfft"]["thresholds"]) == {"0.9", "0.95", "0.99"}
    assert f"{confidence['temperature']:.4g}" in (run.model_dir / "README.md").read_text()
    assert confidence["fitted_on"]["images"] == 18
    assert confidence["measured_on"] == "test"

    files = sorted(map(str, (workplace / "photos/test").rglob("*.png")))
    plain = pipeline("image-classification", model=str(run.model_dir))(files, top_k=1)
    table = {row.file: row.probability for row in run.predictions.itertuples()}
    for file, (answer, *_) in zip(files, plain, strict=True):
        name = file.partition("photos/")[2]
        assert answer["score"] == pytest.approx(table[name], abs=1e-5)

    config["hfft"] = {"temperature": 0.25, "thresholds": {"0.9": 0.7, "0.95": 1.0, "0.99": None}}
    (run.model_dir / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    answers = {}
    for option in ([], ["--calibrated"], ["--precision", "0.95"]):
        assert main(["predict", "runs/bugs", "photos/test", "--top", "3", "--json", *option]) == 0
        answers[" ".join(option)] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for before, after in zip(answers[""], answers["--calibrated"], strict=True):
        shares = np.array(list(before["top"].values())) ** 4
        assert list(after["top"].values()) == pytest.approx(list(shares / shares.sum()), abs=1e-5)
        assert after["label"] == before["label"]
    assert {answer["label"] for answer in answers["--precision 0.95"]} == {"unsure"}
    assert main(["predict", "runs/bugs", "photos/test", "--precision", "0.95"]) == 0
    assert "unsure (" in capsys.readouterr().out
    assert main(["predict", "runs/bugs", "photos/test", "--precision", "0.99"]) == 2
    assert "was not reached on the validation images; the model has: 0.9, 0.95" in capsys.readouterr().err


def test_without_validation_images_there_is_no_temperature(workplace, capsys):
    overrides = ["data.splits.validation=null", "phases.last.metric_for_best_model=accuracy"]
    assert main(["train", "recipe.yaml", *overrides]) == 0
    run = hfft.Run("runs/bugs")
    assert "confidence" not in run.metrics
    assert run.metrics["retention"]["sample"] == {"split": "train", "images": 30}
    assert main(["predict", "runs/bugs", "photos/test", "--calibrated"]) == 2
    assert "config.json has no hfft.temperature" in capsys.readouterr().err


def test_novelty_is_kept_beside_the_model_and_told_of_each_image(workplace, capsys, photos):
    assert main(["train", "recipe.yaml", "novelty=true"]) == 0
    run = hfft.Run("runs/bugs")
    assert (run.model_dir / "novelty.safetensors").is_file()
    rng = np.random.default_rng(0)
    (workplace / "odd").mkdir()
    for number in range(4):  # noise, where the photos are of one colour each
        Image.fromarray(rng.integers(0, 256, (44, 40, 3), dtype=np.uint8)).save(workplace / "odd" / f"{number}.png")
    capsys.readouterr()
    found = {}
    for folder in ("photos/validation", "odd"):
        assert main(["predict", "runs/bugs", folder, "--json", "--novelty"]) == 0
        found[folder] = [json.loads(line)["novelty"] for line in capsys.readouterr().out.splitlines()]
    assert np.mean(found["photos/validation"]) == pytest.approx(0.5, abs=0.06)  # 18 images, their own places
    assert min(found["odd"]) > 0.9
    classify = hfft.Classifier.from_pretrained("runs/bugs", novelty=True)
    together = classify(sorted(map(str, (workplace / "odd").iterdir())), batch_size=3)
    assert [answer.novelty for answer in together] == found["odd"]
    assert main(["predict", "runs/bugs", "odd", "--novelty"]) == 0
    assert "; novelty 1.00" in capsys.readouterr().out
    assert main(["predict", "runs/bugs", "odd", "--novelty", "--format", "csv"]) == 2
    assert "--novelty: csv has no column for it" in capsys.readouterr().err
    assert main(["predict", "runs/bugs", "odd", "--json"]) == 0
    assert "novelty" not in capsys.readouterr().out
