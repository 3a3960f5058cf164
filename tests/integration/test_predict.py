"""`hfft predict` and `hfft evaluate` on a finished run: what the run reported, for images in any form."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import web
from PIL import Image, ImageOps
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss

import hfft
from hfft.cli import main
from hfft.model.adapters import attach, save_adapter
from hfft.model.checkpoint import reopen
from hfft.recipe.spec import AdapterSpec

CLASSES = ("ant", "bee", "cat")
RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training:
  {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true, metric_for_best_model: log_loss}
precision: float32
report: false
phases:
  - {name: all, unfreeze: all, learning_rate: 1.0e-2, num_train_epochs: 20}
"""


def noise(seed, color):
    pixels = np.random.default_rng(seed).integers(-60, 61, (44, 40, 3)) + np.array(color)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_odd_images(folder):
    """One photo in every form that files have it in; `rotated` lies on its side and says so."""
    photo = noise(0, (120, 100, 80))
    photo.save(folder / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to the right
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.jpg", exif=exif)
    photo.save(folder / "photo.jpg")
    photo.convert("L").save(folder / "gray.jpg")
    photo.convert("RGBA").save(folder / "rgba.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("P").save(folder / "palette.gif")
    Image.fromarray(np.random.default_rng(1).integers(0, 65536, (44, 40)).astype(np.uint16)).save(folder / "deep.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with photos and a run over them."""
    home = tmp_path_factory.mktemp("predict")
    for number, name in enumerate(CLASSES):
        color = np.roll((150, 90, 90), number)
        for split, count in (("train", 8), ("validation", 3), ("test", 4)):
            folder = home / "photos" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                noise((number, k, count), color).save(folder / f"{k}.png")
    write_odd_images(home / "photos" / "test" / "ant")
    tiny.save(home / "vit", "vit")
    (home / "recipe.yaml").write_text(RECIPE)
    before = os.getcwd()
    os.chdir(home)
    try:
        hfft.finetune(hfft.load_recipe("recipe.yaml"))
    finally:
        os.chdir(before)
    return home


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def reported(home):
    """Class to probability by path, as in predictions.parquet."""
    table = pd.read_parquet(home / "runs/bugs/predictions.parquet")
    table = table[table["split"] == "test"]
    shares = table[[f"probability {name}" for name in CLASSES]].to_numpy()
    assert len(table) == 21
    assert np.ptp(shares, axis=0).min() > 0.1  # else any image would stand for any other
    paths = "photos/" + table["file"]
    return {path: dict(zip(CLASSES, row, strict=True)) for path, row in zip(paths, shares, strict=True)}


@pytest.fixture(scope="module")
def classify(home):
    return hfft.Classifier.from_pretrained(home / "runs/bugs")


def agrees(found, expected):
    return found == {name: pytest.approx(float(share), abs=2e-6) for name, share in expected.items()}


def opened(path):
    image = ImageOps.exif_transpose(Image.open(path))
    return image if image.mode == "I;16" else image.convert("RGB")


def as_tensor(path):
    return torch.from_numpy(np.array(opened(path)))


FORMS = {
    "path": Path,
    "text": str,
    "bytes": lambda path: Path(path).read_bytes(),
    "Pillow image": Image.open,
    "array": lambda path: np.asarray(opened(path)),
    "tensor": as_tensor,
    "float array": lambda path: np.asarray(opened(path)) / (65535 if "deep" in path else 255),
    "float tensor": lambda path: as_tensor(path).double() / (65535 if "deep" in path else 255),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_in_any_form_gives_what_the_run_reported(form, classify, reported):
    answers = classify((FORMS[form](path) for path in reported), top=3, batch_size=4)
    assert len(answers) == len(reported)
    for answer, (path, expected) in zip(answers, reported.items(), strict=True):
        assert agrees(answer.top, expected), path


def test_a_photo_on_its_side_equals_its_upright_twin(classify, reported):
    folder = "photos/test/ant"
    rotated, upright = classify([f"{folder}/rotated.png", f"{folder}/upright.png"], top=3)
    assert rotated.top == upright.top
    lying = np.asarray(Image.open(f"{folder}/rotated.png"))  # which knows no EXIF
    assert classify(lying, top=3).top != upright.top
    assert agrees(upright.top, reported[f"{folder}/rotated.png"])


# Formats


def predict(*arguments, code=0, capsys):
    assert main(["predict", "runs/bugs", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_the_table(capsys, reported):
    shown = predict("photos/test", "--top", "2", capsys=capsys).out.splitlines()
    assert shown[0].split() == ["file", "label", "and", "probability"]
    assert len(shown) == 1 + len(reported)
    for line, path in zip(shown[1:], sorted(reported), strict=True):
        best = sorted(reported[path].items(), key=lambda pair: -pair[1])[:2]
        assert line.split(maxsplit=1)[0] == path
        assert [word.split()[0] for word in line.split(maxsplit=1)[1].split(", ")] == [name for name, _ in best]


@pytest.mark.parametrize("option", ["--json", "--format=jsonl"])
def test_json_lines(option, capsys, reported):
    lines = [json.loads(line) for line in predict("photos/test", option, "--top", 3, capsys=capsys).out.splitlines()]
    assert [line["file"] for line in lines] == sorted(reported)
    for line in lines:
        assert list(line) == ["file", "label", "probability", "top"]
        assert agrees(line["top"], reported[line["file"]])
        assert line["probability"] == line["top"][line["label"]] == max(line["top"].values())


def test_csv_on_the_screen_and_in_a_file(tmp_path, capsys, reported):
    shown = predict("photos/test", "--format", "csv", capsys=capsys).out
    assert predict("photos/test", "--output", tmp_path / "p.csv", capsys=capsys).out == ""
    assert (tmp_path / "p.csv").read_text() == shown
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert [row["file"] for row in rows] == sorted(reported)
    for row in rows:
        assert agrees({name: float(row[f"probability {name}"]) for name in CLASSES}, reported[row["file"]])
        assert row["prediction"] == max(CLASSES, key=lambda name: float(row[f"probability {name}"]))


def test_parquet_has_the_columns_of_the_runs_own(tmp_path, capsys, reported):
    predict("photos/test", "--output", tmp_path / "p.parquet", capsys=capsys)
    ours, runs = pd.read_parquet(tmp_path / "p.parquet"), pd.read_parquet("runs/bugs/predictions.parquet")
    runs = runs[runs["split"] == "test"].assign(file="photos/" + runs["file"])
    joined = runs.drop(columns=["split", "label"]).sort_values("file").reset_index(drop=True)
    assert list(ours.columns) == list(joined.columns)
    pd.testing.assert_frame_equal(ours, joined, check_exact=False, atol=2e-6, rtol=0, check_dtype=False)
    assert [str(kind) for kind in ours.dtypes[2:]] == ["float32"] * 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "parquet"], "--format parquet: needs a file; add --output FILE"),
        (["--output", "p.txt"], "--output p.txt: the ending tells no format"),
        (["--output", "photos"], "--output photos: is a folder; give the name of a file"),
        (["--output", "none/p.csv"], "--output none/p.csv: there is no folder "),
        (["--format", "csv", "--top", "2"], "--top 2: csv holds all classes; leave --top out"),
        (["--device", "abacus"], "device: abacus can't be used: "),
    ],
)
def test_requests_that_cannot_be(options, reason, capsys):
    assert reason in predict("photos/test", *options, code=2, capsys=capsys).err


def test_two_formats_at_once(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "runs/bugs", "photos/test", "--json", "--format", "csv"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


# Broken images


@pytest.fixture
def mixed(tmp_path, home):
    """Two good images around a broken one."""
    shutil.copy(home / "photos/test/bee/0.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_text("words")
    shutil.copy(home / "photos/test/cat/0.png", tmp_path / "c.png")
    return tmp_path


@pytest.mark.parametrize("form", ["table", "jsonl", "csv"])
def test_skipped_images_are_listed_and_the_others_printed(form, mixed, capsys):
    shown = predict(mixed, "--on-error", "skip", "--format", form, code=1, capsys=capsys)
    assert shown.err == (
        f"error: skipped 1 of 3 images, which can't be read:\n  {mixed}/b.png: not an image in any format that hfft "
        "reads\n"
    )
    assert [f"{name}.png" in shown.out for name in "abc"] == [True, False, True]
    assert len(shown.out.splitlines()) == (2 if form == "jsonl" else 3)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_file_is_whole_or_not_there(ending, mixed, capsys):
    output = mixed / f"out.{ending}"
    reason = f"error: {mixed}/b.png: not an image in any format that hfft reads\n"
    assert predict(mixed, "--output", output, code=2, capsys=capsys).err == reason
    assert sorted(path.name for path in mixed.iterdir()) == ["a.png", "b.png", "c.png"]
    predict(mixed, "--output", output, "--on-error", "skip", code=1, capsys=capsys)
    read = {"jsonl": lambda path: pd.read_json(path, lines=True), "csv": pd.read_csv, "parquet": pd.read_parquet}
    assert read[ending](output)["file"].tolist() == [f"{mixed}/a.png", f"{mixed}/c.png"]


def test_lines_before_a_broken_image_are_printed(mixed, capsys):
    shown = predict(mixed, "--json", code=2, capsys=capsys)
    assert [json.loads(line)["file"] for line in shown.out.splitlines()] == [f"{mixed}/a.png"]


# Where images come from


def test_images_from_the_web(home, capsys, reported):
    path = "photos/test/bee/1.png"
    with web.serving((home / path).read_bytes()) as (site, asked):
        refused = predict(f"{site}/image.png", code=2, capsys=capsys)
        assert refused.err == f"error: {site}/image.png: a URL is fetched with --allow-url only\n"
        assert asked == []
        shown = predict(f"{site}/image.png", f"{site}/moved", "--allow-url", "--json", "--top", 3, capsys=capsys)
        for line, name in zip(map(json.loads, shown.out.splitlines()), ("image.png", "moved"), strict=True):
            assert line["file"] == f"{site}/{name}"
            assert agrees(line["top"], reported[path])


def test_trouble_on_the_web(home, capsys):
    reasons = {
        "missing": "can't be fetched: the server answered 404 Not Found",
        "page": "is a web page (text/html) and no image",
        "huge": "is larger than 64 MiB, the most that is fetched",
        "words": "not an image in any format that hfft reads",
    }
    with web.serving((home / "photos/test/bee/1.png").read_bytes()) as (site, _):
        for name, reason in reasons.items():
            assert predict(f"{site}/{name}", "--allow-url", code=2, capsys=capsys).err == (
                f"error: {site}/{name}: {reason}\n"
            )
        urls = [f"{site}/{name}" for name in ("image.png", *reasons)]
        shown = predict(*urls, "--allow-url", "--on-error", "skip", "--json", code=1, capsys=capsys)
    assert [json.loads(line)["file"] for line in shown.out.splitlines()] == [f"{site}/image.png"]
    lines = [f"  {site}/{name}: {reason}" for name, reason in reasons.items()]
    assert shown.err == "\n".join(["error: skipped 4 of 5 images, which can't be read:", *lines, ""])


def test_a_glob_and_a_list(capsys, monkeypatch):
    globbed = predict("photos/test/*/[01].png", "--json", capsys=capsys).out
    files = [json.loads(line)["file"] for line in globbed.splitlines()]
    assert files == [f"photos/test/{name}/{k}.png" for name in CLASSES for k in range(2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(files)))
    assert predict("-", "--json", capsys=capsys).out == globbed


def test_three_thousand_images_for_a_reader_that_leaves_early(tmp_path):
    """As `hfft predict ... --json | head -1` does: no traceback, and no work for nobody."""
    for number in range(3000):
        os.link("photos/test/bee/0.png", tmp_path / f"{number:04d}.png")
    command = [sys.executable, "-m", "hfft", "predict", "runs/bugs", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["file"] == str(tmp_path / "0000.png")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# evaluate


def expected_metrics(reported, labels, classes=CLASSES):
    shares = np.array([[reported[path][name] for name in classes] for path in labels], dtype=np.float64)
    truth, best = np.array([classes.index(name) for name in labels.values()]), shares.argmax(axis=1)
    numbers = range(len(classes))
    return {
        "accuracy": np.mean(truth == best),
        "balanced_accuracy": balanced_accuracy_score(truth, best),
        "macro_f1": f1_score(truth, best, labels=numbers, average="macro", zero_division=0),
        "log_loss": log_loss(truth, shares / shares.sum(axis=1, keepdims=True), labels=numbers),
    }


def evaluate(*arguments, capsys):
    assert main(["evaluate", "runs/bugs", "--json", *map(str, arguments)]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


@pytest.mark.parametrize("options", [[], ["--batch-size", 5, "--workers", 0], ["--workers", 2]])
def test_evaluate_on_the_runs_own_images_and_on_a_copy(options, home, capsys):
    runs = hfft.Run("runs/bugs").metrics
    for data in ([], ["--data", "photos/test"], ["--data", "photos", "--split", "test"]):
        found, said = evaluate(*data, *options, capsys=capsys)
        assert found["images"] == 21
        for name, row in runs["test"].items():
            assert found["metrics"][name] == pytest.approx(row, abs=1e-5)
        assert found["by_class"] == runs["by_class"]["test"]
        assert "no image is labelled" not in said


def test_evaluate_on_images_of_some_of_the_classes(tmp_path, reported, capsys):
    for name in ("bee", "cat"):
        shutil.copytree(f"photos/test/{name}", tmp_path / "new" / name)
    found, said = evaluate("--data", tmp_path / "new", capsys=capsys)
    labels = {path: path.split("/")[2] for path in reported if "/ant/" not in path}
    assert found["images"] == len(labels) == 8
    for name, value in expected_metrics(reported, labels).items():
        assert found["metrics"][name]["value"] == pytest.approx(value, abs=1e-5)
        row = found["metrics"][name]
        assert row["low"] is None if name == "log_loss" else row["low"] <= row["value"] <= row["high"]  # of 8 images
    assert found["by_class"]["ant"]["images"] == 0
    assert (
        "no image is labelled with 1 of the model's 3 classes (ant): macro F1 takes each of them as 0, balanced "
        "accuracy leaves them out" in said
    )
    assert main(["evaluate", "runs/bugs", "--data", str(tmp_path / "new")]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ant ")]
    assert (row[2], row[4]) == ("-", "0")


def test_evaluate_writes_predictions_as_a_run_does(tmp_path, capsys):
    evaluate("--output", tmp_path / "p.parquet", capsys=capsys)
    ours, runs = pd.read_parquet(tmp_path / "p.parquet"), hfft.Run("runs/bugs").predictions
    runs = runs[runs["split"] == "test"].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, runs, check_exact=False, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["runs/bugs", "--output", "p.csv"], "--output p.csv: allowed: a name that ends in .parquet"),
        (["runs/bugs", "--output", "none/p.parquet"], "there is no folder "),
        (["runs/bugs", "--split", "holdout"], "no split 'holdout'; found: train, validation, test"),
        (["vit"], "vit is no run folder, which would have images of its own; give some with --data"),
    ],
)
def test_evaluations_that_cannot_be(options, reason, capsys):
    assert main(["evaluate", *options]) == 2
    assert reason in capsys.readouterr().err


def test_evaluate_an_adapter_folder(tmp_path, capsys):
    base, processor = reopen("runs/bugs/model")
    model = attach(base, AdapterSpec()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(model, processor, tmp_path / "adapter", base=str(Path("runs/bugs/model").resolve()), revision=None)
    shares, labels = {}, {}
    for name in ("bee", "cat"):
        shutil.copytree(f"photos/test/{name}", tmp_path / "new" / name)
        for file in (tmp_path / "new" / name).iterdir():  # through PEFT, where nothing is merged
            with torch.inference_mode():
                logits = model(**processor(images=opened(file), return_tensors="pt")).logits[0]
            shares[file] = dict(zip(CLASSES, logits.softmax(0).tolist(), strict=True))
            labels[file] = name
    assert main(["evaluate", str(tmp_path / "adapter"), "--data", str(tmp_path / "new"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 8
    for name, value in expected_metrics(shares, labels).items():
        assert found["metrics"][name]["value"] == pytest.approx(value, abs=1e-5)
