"""Images with any number of labels, by the real command line: from a table to what others do with the model."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import warm
from PIL import Image
from safetensors.torch import load_file
from sklearn import metrics as sk

import hfft
from hfft.cli import main
from hfft.errors import HfftError
from hfft.inference.demo_page import make_labeler
from hfft.metrics.thresholds import choose_thresholds

NAMES = ("blue", "green", "red")
RECIPE = """
name: colors
model: {checkpoint: vit}
data: {source: colors/flags.csv}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true}
precision: float32
novelty: true
widget: 3
replay: {engine: torch}
phases:
  - {name: head}
  - {name: last, unfreeze: {blocks: 2}, learning_rate: 5.0e-3, num_train_epochs: 12}
  - {name: lora, adapter: {on: attention}, learning_rate: 1.0e-3, num_train_epochs: 1}
"""
CLASSIFIER = """
import json, sys
import hfft
print(json.dumps([answer.labels for answer in hfft.Classifier.from_pretrained(sys.argv[1])(sys.argv[2:])]))
"""
SHORT = ["report=false", "label_hints=false", "novelty=false", "retain.measure=false", "training.num_train_epochs=2"]
PIPELINE = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1])
print(json.dumps([classify(path, top_k=None) for path in sys.argv[2:]]))
"""


def draw(folder, count):
    """Images whose channels are bright where they have the label; one table of them in each form."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sets = rng.random((count, 3)) < (0.5, 0.4, 0.25)
    for number, row in enumerate(sets):
        pixels = rng.integers(0, 90, (40, 40, 3)) + 110 * row[::-1]  # red comes first in pixels
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    named = [[name for name, has in zip(NAMES, row, strict=True) if has] for row in sets]
    files = [f"{number:03d}.png" for number in range(count)]
    pd.DataFrame({"file_name": files, **dict(zip(NAMES, sets.T.astype(int), strict=True))}).to_csv(
        folder / "flags.csv", index=False
    )
    pd.DataFrame({"file_name": files, "labels": list(map(json.dumps, named))}).to_csv(
        folder / "lists.csv", index=False
    )


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    home = tmp_path_factory.mktemp("multi")
    draw(home / "colors", 160)
    tiny.save(home / "vit")
    (home / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "recipe.yaml"]) == 0
    return home


@pytest.fixture
def workplace(origin, monkeypatch):
    monkeypatch.chdir(origin)
    return origin


def run():
    return hfft.Run("runs/colors")


def truth_and_shares(split):
    table = run().predictions.query("split == @split")
    truth = np.array([[name in names for name in NAMES] for names in table["label"]])
    given = np.array([[name in names for name in NAMES] for names in table["prediction"]])
    return truth, given, table[[f"probability {name}" for name in NAMES]].to_numpy()


# The run


def test_the_model_says_what_it_is(workplace):
    config = json.loads((workplace / "runs/colors/model/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    truth, _, shares = truth_and_shares("validation")
    assert config["hfft"]["label_thresholds"] == pytest.approx(choose_thresholds(shares, truth).tolist())
    assert config["hfft"]["temperature"] > 0


def test_it_has_learned_something(workplace):
    metrics = run().metrics
    assert metrics["test"]["mean_average_precision"]["value"] > 0.9
    for name in ("prevalence", "knn", "head"):
        assert 0 < metrics["baselines"][name]["test"]["mean_average_precision"]["value"] <= 1
    assert metrics["confusion"] == {"validation": {}, "test": {}}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_metrics_are_those_of_the_predictions(workplace, split):
    truth, given, shares = truth_and_shares(split)
    found = run().metrics
    kept = np.array(json.loads((workplace / "runs/colors/model/config.json").read_text())["hfft"]["label_thresholds"])
    assert np.array_equal(given, shares >= kept)
    expected = {
        "mean_average_precision": sk.average_precision_score(truth, shares),
        "macro_f1": sk.f1_score(truth, given, average="macro"),
        "micro_f1": sk.f1_score(truth, given, average="micro"),
        "subset_accuracy": sk.accuracy_score(truth, given),
        "hamming_loss": sk.hamming_loss(truth, given),
    }
    for name, value in expected.items():
        row = found[split][name]
        assert row["value"] == pytest.approx(value)
        assert row["low"] <= row["value"] <= row["high"]
    for k, name in enumerate(NAMES):
        assert found["by_class"][split][name]["average_precision"] == pytest.approx(
            sk.average_precision_score(truth[:, k], shares[:, k])
        )


def test_a_prevalence_knows_nothing(workplace):
    truth, _, _ = truth_and_shares("test")
    found = run().metrics["baselines"]["prevalence"]["test"]
    assert found["mean_average_precision"]["value"] == pytest.approx(truth.mean(axis=0).mean())


def test_the_phase_is_kept_by_mean_average_precision(workplace):
    kept = run().metrics["kept"]
    assert {name for values in kept["values"].values() for name in values} == {"mean_average_precision"}
    history = [json.loads(line) for line in (run().phase_dir(0) / "history.jsonl").read_text().splitlines()]
    scores = [entry["eval_mean_average_precision"] for entry in history if "weight_decay" in entry]
    best = json.loads((run().phase_dir(0) / "result.json").read_text())["metrics"]["mean_average_precision"]
    assert best == max(scores)


def test_card_and_figures(workplace):
    card = (workplace / "runs/colors/model/README.md").read_text()
    for words in (
        "which of these classes an image shows, any number of them: blue, green and red",
        "Each label has a probability of its own",
        "| class | images | precision | recall | F1 | average precision | threshold |",
        "- multi-label",
        "gives each label its best F1 on the validation images",
    ):
        assert words in card
    for words in ("confusion", "Accuracy on", "one of its classes", "taken for"):
        assert words not in card
    figures = {path.name for path in (workplace / "runs/colors/figures").glob("*.png")}
    assert figures == {"first_batch.png", "learning_curves.png", "reliability_test.png"}
    assert main(["report", "runs/colors"]) == 0
    page = (workplace / "runs/colors/report.html").read_text()
    for words in ("Mean average precision", "whose probability reaches their threshold", "probability of the label"):
        assert words in page
    for words in ("were taken for", "mistaken most often for", "I don't know", "None</"):
        assert words not in page
    assert (workplace / "runs/colors/model/README.md").read_text() == card


def test_examples_have_their_labels(workplace):
    examples = run().metrics["examples"]
    assert len(examples) == 3
    known = {" + ".join(n for n in NAMES if n in names) or "no label" for names in run().predictions["label"]}
    assert {example["label"] for example in examples} <= known


# The same, written otherwise or trained otherwise


def train(*overrides):
    return hfft.finetune(hfft.load_recipe("recipe.yaml", [*SHORT, *overrides]))


def weights(found):
    return load_file(found.model_dir / "model.safetensors")


def test_a_table_of_lists_gives_the_same_bits(workplace):
    flags = train("name=flags", "phases.lora.num_train_epochs=1")
    lists = train("name=lists", "phases.lora.num_train_epochs=1", "data.source=colors/lists.csv")
    one, other = weights(flags), weights(lists)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert flags.predictions.equals(lists.predictions)
    for split in ("validation", "test"):
        assert flags.metrics[split] == lists.metrics[split]


def test_replay_changes_no_bit(workplace):
    more = ["phases.head.learning_rate=0.01", "phases.last.num_train_epochs=2", "replay.views=3"]
    plain = train("name=plain", "replay.mode=off", *more)
    replayed = train("name=replayed", "replay.mode=force", *more)
    one, other = weights(plain), weights(replayed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (replayed.phase_dir(1) / "replay.json").is_file()
    assert plain.metrics["test"] == replayed.metrics["test"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss={name: focal, gamma: 1}", "class_weights=balanced"],
        ["class_weights={blue: 1, green: 2, red: 3}", "training.label_smoothing_factor=0.1"],
        ["data.augment.mixup=0.2", "phases.head.learning_rate=0.01"],
        ["training.metric_for_best_model=hamming_loss", "retain.interpolate=auto"],
        ["data.splits={validation: null, test: 0.2}", "phases.head.learning_rate=0.01"],
        ["phases.lora.adapter.merge=false", "keep=last"],
    ],
    ids=["focal", "weights and smoothing", "mixup", "hamming loss and interpolation", "no validation", "adapter"],
)
def test_recipes_that_make_sense(workplace, overrides, request):
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.callspec.id)
    found = train(f"name={name}", *overrides, "phases.last.num_train_epochs=1")
    assert 0 < found.metrics["test"]["mean_average_precision"]["value"] <= 1
    assert np.isfinite([row["value"] for row in found.metrics["test"].values()]).all()
    if "null" in overrides[0]:
        assert {row["threshold"] for row in found.metrics["by_class"]["test"].values()} == {0.5}
        assert "a threshold of 0.5 for each label" in (found.model_dir / "README.md").read_text()
    if "interpolate" in overrides[-1]:
        assert found.metrics["interpolation"]["metric"] == "hamming_loss"
    classifier = hfft.Classifier.from_pretrained(found.folder)
    thresholds = [row["threshold"] for row in found.metrics["by_class"]["test"].values()]
    assert classifier.thresholds.tolist() == thresholds
    labels = classifier("colors/000.png").labels
    assert set(labels) <= set(NAMES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler=balanced", "sampler: 'balanced' draws images by their one class"),
        ("loss={name: logit_adjusted}", "loss.name: 'logit_adjusted' is for classes that exclude each other"),
        ("data.max_per_class=3", "data.max_per_class: "),
        ("training.metric_for_best_model=accuracy", "found 'accuracy'; allowed: mean_average_precision, macro_f1"),
        ("data.task=single_label", r"label_column: none fits; name one of file_name, blue, green, red"),
    ],
)
@pytest.mark.parametrize("task", ["auto", "multi_label"])
def test_recipes_that_make_none(workplace, override, message, task, capsys):
    rate = "phases.head.learning_rate=0.01"
    assert main(["train", "recipe.yaml", "name=none", rate, f"data.task={task}", override]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/none").exists()


def test_all_refusals_come_together(workplace):
    with pytest.raises(HfftError) as error:
        hfft.load_recipe(
            "recipe.yaml", ["data.task=multi_label", "sampler=sqrt", "data.max_per_class=3", "data.weight_column=w"]
        )
    for key in ("sampler", "data.max_per_class", "data.weight_column"):
        assert f"  {key}: " in str(error.value)


def test_folds(workplace, capsys):
    more = ["phases.head.learning_rate=0.01", "phases.last.num_train_epochs=1", "folds=2", "name=folds"]
    assert main(["train", "recipe.yaml", *SHORT, *more]) == 0
    assert "mean average precision" in capsys.readouterr().out
    table = pd.read_parquet("runs/folds/predictions.parquet")
    assert sorted(table["file"]) == [f"{k:03d}.png" for k in range(160)]
    truth, given = (
        np.array([[name in names for name in NAMES] for names in table[column]]) for column in ("label", "prediction")
    )
    found = json.loads(Path("runs/folds/summary.json").read_text())["test"]
    assert found["macro_f1"]["value"] == pytest.approx(sk.f1_score(truth, given, average="macro"))


# What others do with it


def files(count=6):
    return [f"colors/{number:03d}.png" for number in range(count)]


def test_the_pipeline_gives_the_classifiers_probabilities(workplace):
    found = warm.run([sys.executable, "-c", PIPELINE, "runs/colors/model", *files()])
    assert found.returncode == 0, found.stderr
    ours = hfft.Classifier.from_pretrained("runs/colors")(files(), top=3)
    assert any(sum(prediction.top.values()) > 1.2 for prediction in ours)  # which no softmax gives
    for rows, prediction in zip(json.loads(found.stdout), ours, strict=True):
        theirs = {row["label"]: row["score"] for row in rows}
        assert theirs == pytest.approx(prediction.top, abs=1e-5)


def test_the_classifier_gives_labels_by_their_thresholds(workplace):
    table = run().predictions.query("split == 'test'")
    paths = [f"colors/{file}" for file in table["file"]]
    for options in ({}, {"calibrated": True}):  # other probabilities, the same labels
        found = hfft.Classifier.from_pretrained("runs/colors", **options)(paths)
        assert [sorted(one.labels) for one in found] == [sorted(names) for names in table["prediction"]]
        assert [one.label for one in found] == [", ".join(one.labels) for one in found]
    assert hfft.Classifier.from_pretrained("runs/colors", novelty=True)(paths[0]).novelty is not None
    with pytest.raises(HfftError, match="precision: is for models that give an image one label"):
        hfft.Classifier.from_pretrained("runs/colors", precision=0.9)


def test_predictions_on_the_screen_and_in_files(workplace, capsys):
    expected = hfft.Classifier.from_pretrained("runs/colors")(files(), top=3)
    assert main(["predict", "runs/colors", *files()]) == 0
    shown = capsys.readouterr().out
    for one in expected:
        words = ", ".join(f"{label} {share:.4f}" for label, share in one.labels.items()) or "none"
        assert f"{one.file}  {words}" in shown
    assert main(["predict", "runs/colors", *files(), "--json", "--top", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["labels"] for line in lines] == [pytest.approx(one.labels) for one in expected]
    assert main(["predict", "runs/colors", *files(), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["file", "prediction", *(f"probability {name}" for name in NAMES)]
    assert [json.loads(row["prediction"]) for row in rows] == [sorted(one.labels) for one in expected]
    assert main(["predict", "runs/colors", *files(), "--output", "found.parquet"]) == 0
    table = pd.read_parquet("found.parquet")
    assert [list(names) for names in table["prediction"]] == [sorted(one.labels) for one in expected]


@pytest.mark.parametrize("form", ["flags", "lists"])
def test_evaluation_on_a_table(workplace, capsys, form):
    assert main(["evaluate", "runs/colors", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own["metrics"] == run().metrics["test"]
    held_out = set(run().predictions.query("split == 'test'")["file"])
    table = pd.read_csv(f"colors/{form}.csv")
    table[table["file_name"].isin(held_out)].to_csv(f"colors/{form}_test.csv", index=False)
    assert main(["evaluate", "runs/colors", "--data", f"colors/{form}_test.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == own["metrics"]
    assert main(["evaluate", "runs/colors", "--data", f"colors/{form}_test.csv"]) == 0
    shown = capsys.readouterr().out
    assert "AP" in shown
    assert "threshold" in shown


def test_evaluation_of_images_with_one_label(workplace, capsys):
    """Class folders can't say whether an image has other labels too."""
    (workplace / "folders" / "red").mkdir(parents=True, exist_ok=True)
    shutil.copy("colors/000.png", workplace / "folders" / "red" / "1.png")
    assert main(["evaluate", "runs/colors", "--data", "folders"]) == 2
    assert "is a folder of class folders, where an image has one label" in capsys.readouterr().err


def test_export(workplace, capsys):
    assert main(["export", "runs/colors", "--output", "onnx", "--overwrite"]) == 0
    shown = capsys.readouterr().out
    count = len(run().predictions.query("split == 'test'"))
    assert f"the same labels for {count} of {count}" in shown
    found = subprocess.run(
        [sys.executable, "onnx/predict.py", *files()], capture_output=True, text=True, check=True, env=os.environ
    )
    given: dict[str, dict[str, float]] = {file: {} for file in files()}
    for line in found.stdout.splitlines():
        file, label, share = line.split("\t")
        if label != "none":
            given[file][label] = float(share)
    for one in hfft.Classifier.from_pretrained("runs/colors")(files()):
        assert given[one.file] == pytest.approx(one.labels, abs=2e-3)  # torchvision's resize is not Pillow's


def test_the_page_shows_each_labels_own_probability(workplace):
    classifier = hfft.Classifier.from_pretrained("runs/colors")
    shares, _ = make_labeler(classifier.model, classifier.processor)("colors/000.png")
    assert shares == pytest.approx(classifier("colors/000.png", top=3).top, abs=1e-5)


def test_what_was_pushed_gives_the_same_labels(workplace, tmp_path):
    """By processes with caches of their own: transformers' probabilities and hfft's labels."""
    with hub_server.running() as hub:

        def child(*words, home):
            environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
            environment |= hub.environment(tmp_path / home, "hf_mine")
            done = warm.run([sys.executable, *words], env=environment)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        assert child("-m", "hfft", "push", "runs/colors", "me/colors", "--json", home="one")["largest_difference"] == 0
        shares = child("-c", PIPELINE, "me/colors", *files(), home="two")
        lines = child("-c", CLASSIFIER, "me/colors", *files(), home="two")
    for rows, labels, ours in zip(
        shares, lines, hfft.Classifier.from_pretrained("runs/colors")(files(), top=3), strict=True
    ):
        assert {row["label"]: row["score"] for row in rows} == pytest.approx(ours.top, abs=1e-5)
        assert labels == pytest.approx(ours.labels)


def test_two_runs(workplace, capsys):
    other = train("name=other", "phases.head.learning_rate=0.01", "phases.last.num_train_epochs=1", "seed=0")
    found = hfft.compare(["runs/colors", other.folder])
    assert found.pair is not None
    for name, row in found.pair.differences.items():
        expected = other.metrics["test"][name]["value"] - run().metrics["test"][name]["value"]
        assert row["value"] == pytest.approx(expected)
    exact = found.pair.differences["subset_accuracy"]["value"] * found.pair.images
    assert found.pair.mcnemar.only_second - found.pair.mcnemar.only_first == pytest.approx(exact)
    assert main(["compare", "runs/colors", str(other.folder)]) == 0
    assert "mean average precision" in capsys.readouterr().out


def test_check_data_knows_sets_of_labels(workplace, capsys):
    table = pd.read_csv("colors/lists.csv")
    shutil.copy("colors/000.png", "colors/copy.png")
    wrong = '["red"]' if table["labels"][0] != '["red"]' else '["blue"]'
    table.loc[len(table)] = ["copy.png", wrong]
    table.to_csv("colors/twice.csv", index=False)
    assert main(["check-data", "colors/twice.csv"]) == 1
    shown = capsys.readouterr().out
    first = " + ".join(json.loads(table["labels"][0])) or "no label"
    assert "two labels (harm): the same file under two labels: 1" in shown
    assert all(part in shown for part in (first, wrong[2:-2], "copy.png"))
    counts = table["labels"].str.contains("red").sum()
    assert any(line.split() == ["red", str(counts)] for line in shown.splitlines())


def test_a_model_and_data_in_memory(workplace):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List
    from datasets import Image as ImageFeature

    table = pd.read_csv("colors/lists.csv")
    content = {"image": [f"colors/{file}" for file in table["file_name"]]}
    content["tags"] = [[NAMES.index(name) for name in json.loads(cell)] for cell in table["labels"]]
    features = Features({"image": ImageFeature(), "tags": List(ClassLabel(names=list(NAMES)))})
    data = DatasetDict(train=Dataset.from_dict(content, features=features))
    recipe = hfft.load_recipe(
        "recipe.yaml", [*SHORT, "name=memory", "phases.head.learning_rate=0.01", "data.source=x"]
    )
    found = hfft.finetune(recipe, data=data, model=tiny.build("vit", 3))
    assert hfft.Classifier.from_pretrained(found.folder).is_multi_label
    assert found.metrics["test"]["mean_average_precision"]["value"] > 0
