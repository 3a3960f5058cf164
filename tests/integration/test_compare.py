"""`hfft compare` on real runs, and on copies of them that lack what a comparison needs."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny
from pages import Page
from pictures import make_photos
from scipy.stats import binomtest

import hfft
from hfft.cli import main
from hfft.errors import RunError

RECIPE = """
name: weak
output_dir: runs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true}
precision: float32
report: false
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-3, max_steps: 1}
"""
STRONG = ["name=strong", "phases.head.max_steps=40", "phases.head.learning_rate=3e-2"]
SPLITS = {f"{split}/{name}": 8 for split in ("train", "validation", "test") for name in ("ant", "bee", "cat")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has hardly begun to learn, one that has learned, and one of two classes."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_photos(folder / "photos", SPLITS)
        make_photos(folder / "two", {path: count for path, count in SPLITS.items() if "cat" not in path})
        tiny.save(folder / "vit", "vit")
        Path("recipe.yaml").write_text(RECIPE)
        for overrides in ([], STRONG, ["name=two", "data.source=two"]):
            hfft.finetune(hfft.load_recipe("recipe.yaml", overrides))
    return folder


@pytest.fixture
def workplace(finished, tmp_path, monkeypatch):
    """Copies, to be changed."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(path, edit):
    content = json.loads(Path(path).read_text())
    edit(content)
    Path(path).write_text(json.dumps(content))


def test_two_runs_side_by_side(workplace, capsys):
    assert main(["compare", "runs/weak", "runs/strong", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weak, strong = (hfft.Run(f"runs/{name}") for name in ("weak", "strong"))
    assert found["split"] == "test"
    assert [row["run"] for row in found["rows"]] == ["runs/weak", "runs/strong"]
    for row, run in zip(found["rows"], (weak, strong), strict=True):
        assert row["metrics"] == run.metrics["test"]
        assert (row["images"], row["phase"]) == (24, "head")
        assert row["trainable"] == 3 * 16 + 3
        assert row["seconds"] > 0
    pair = found["pair"]
    right = [run.predictions[lambda t: t["split"] == "test"].eval("label == prediction") for run in (weak, strong)]
    assert pair["images"] == 24
    difference = pair["differences"]["accuracy"]
    assert difference["value"] == pytest.approx(right[1].mean() - right[0].mean())
    assert difference["value"] > 0.3
    assert difference["low"] > 0
    counts = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert [pair["mcnemar"]["only_first"], pair["mcnemar"]["only_second"]] == counts
    assert pair["mcnemar"]["p_value"] == pytest.approx(binomtest(counts[0], sum(counts)).pvalue)
    assert found["notes"] == []

    assert main(["compare", "runs/weak", "runs/strong"]) == 0
    shown = capsys.readouterr().out
    assert f"{strong.metrics['test']['accuracy']['value']:.4f} (" in shown
    assert "runs/strong minus runs/weak, on the 24 images of both:" in shown
    assert f"{difference['value']:+.4f}" in shown
    assert "McNemar's exact p = " in shown


def test_the_classes_of_a_run_may_be_in_another_order(workplace):
    expected = hfft.compare(["runs/weak", "runs/strong"]).pair
    change("runs/strong/data.json", lambda data: data["labels"].reverse())
    found = hfft.compare(["runs/weak", "runs/strong"])
    assert (found.pair, found.notes) == (expected, ())


def test_three_runs_are_a_table(workplace, capsys):
    assert main(["compare", "runs/weak", "runs/strong", "runs/weak"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("runs/weak") == 2
    assert "minus" not in shown


def test_runs_with_other_classes_are_a_table_without_pairs(workplace, capsys):
    assert main(["compare", "runs/weak", "runs/two"]) == 0
    shown = capsys.readouterr().out
    assert "note: runs/two has other classes (ant, bee) than runs/weak (ant, bee, cat)" in shown
    assert "note: no paired comparison, as the classes differ" in shown


def test_other_images_are_paired_by_name_only_if_they_are_of_one_source(workplace):
    def other(data):
        data["splits"]["test"]["fingerprint"] = "other"

    change("runs/strong/data.json", other)
    predictions = pd.read_parquet("runs/strong/predictions.parquet")
    kept = predictions[(predictions["split"] == "test") & (predictions["label"] != "cat")]
    kept.to_parquet("runs/strong/predictions.parquet")
    found = hfft.compare(["runs/weak", "runs/strong"])
    assert found.pair is not None
    assert found.pair.images == 16
    assert found.notes == (
        "the test images of runs/strong are not those of runs/weak",
        "paired are the 16 images that have name and label in common",
    )
    kept.assign(file="x" + kept["file"]).to_parquet("runs/strong/predictions.parquet")
    found = hfft.compare(["runs/weak", "runs/strong"])
    assert (found.pair, found.notes[-1]) == (
        None,
        "no paired comparison, as the runs have no test image in common",
    )
    recipe = Path("runs/strong/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("source: photos", "source: others"))
    assert hfft.compare(["runs/weak", "runs/strong"]).notes[-1] == (
        "no paired comparison, as the images are of other sources: photos, others"
    )


def test_a_split_that_all_have(workplace):
    change("runs/two/metrics.json", lambda metrics: metrics.pop("test"))
    assert hfft.compare(["runs/weak", "runs/two"]).split == "validation"
    with pytest.raises(
        RunError, match="no test split that all runs have: runs/weak has test and validation; runs/two"
    ):
        hfft.compare(["runs/weak", "runs/two"], split="test")
    assert hfft.compare(["runs/weak", "runs/strong"], split="validation").split == "validation"


def test_what_is_no_finished_run_is_refused(workplace, capsys):
    assert main(["compare", "runs/weak"]) == 2
    assert "give the folders of two runs or more" in capsys.readouterr().err
    assert main(["compare", "runs/weak", "runs"]) == 2
    assert "runs is no run folder" in capsys.readouterr().err
    Path("runs/two/metrics.json").unlink()
    assert main(["compare", "runs/weak", "runs/two"]) == 2
    assert "runs/two: this run is not finished" in capsys.readouterr().err
    Path("runs/strong/predictions.parquet").write_bytes(bytes(8))
    assert main(["compare", "runs/weak", "runs/strong"]) == 2
    assert "the predictions can't be read" in capsys.readouterr().err


def test_a_page_is_written_beside_the_table_or_the_json(workplace, capsys):
    assert main(["compare", "runs/weak", "runs/strong", "--html", "pages.html"]) == 0
    assert capsys.readouterr().out.endswith("page: pages.html\n")
    page = Page.of(Path("pages.html").read_text(encoding="utf-8"))
    accuracy = hfft.Run("runs/strong").metrics["test"]["accuracy"]["value"]
    assert f"The highest accuracy {100 * accuracy:.1f} % strong" in page.words
    assert "strong minus weak, on the 24 images of both" in page.words
    assert "accuracy +" in page.words
    assert main(["compare", "runs/weak", "runs/two", "runs/strong", "--json", "--html", "pages.html"]) == 0
    json.loads(capsys.readouterr().out)
    page = Page.of(Path("pages.html").read_text(encoding="utf-8"))
    assert "Note runs/two has other classes (ant, bee) than runs/weak (ant, bee, cat)" in page.words
    assert "choose by the validation images" in page.words


@pytest.mark.parametrize(
    ("file", "words"),
    [("page.pdf", "ends in .html"), ("nowhere/page.html", "there is no folder "), ("a.html", "a folder")],
)
def test_a_page_that_has_no_place_is_refused_before_any_work(file, words, workplace, capsys):
    Path("a.html").mkdir()
    for command in (["compare", "runs/weak", "runs/strong"], ["sweep", "recipe.yaml", "seed=0,1"]):
        assert main([*command, "--html", file]) == 2
        assert words in capsys.readouterr().err


def test_retention_is_that_of_the_model_at_hand(workplace):
    kept = hfft.compare(["runs/weak", "runs/strong"]).rows[0].retention
    stored = hfft.Run("runs/weak").metrics["retention"]["phases"]["head"]
    assert kept["nearest"] == stored["knn_accuracy"]["after"]
    assert kept["drift"] == stored["head_input"]["cosine_drift"] == 0
    change("runs/weak/metrics.json", lambda metrics: metrics.pop("retention"))
    assert hfft.compare(["runs/weak", "runs/strong"]).rows[0].retention == {}
