"""A run on a folder with every known defect ends as the run on the same folder without its broken files."""

import json

import hostile
import pandas as pd
import pytest
import tiny
from PIL import Image as PillowImage
from transformers import pipeline

import hfft


def recipe(tmp_path, name, source, **data):
    return hfft.load_recipe(
        {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "model": {"checkpoint": str(tmp_path / "checkpoint")},
            "data": {"source": str(source), "augment": {"crop": [0.6, 1.0], "flip": True}, **data},
            "training": {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 8},
            "phases": [{"name": "head"}, {"name": "block", "unfreeze": {"blocks": 1}}],
            "precision": "float32",
            "report": False,
            "replay": {"engine": "torch"},
        }
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("carved", [True, False], ids=["carved splits", "splits of the source"])
def test_broken_files_leave_no_trace_in_the_result(carved, checkpoint, tmp_path):
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    expected = hostile.make_hostile(tmp_path / "hostile", {**hostile.BROKEN, **hostile.ODD})
    hostile.clean(tmp_path / "hostile", tmp_path / "clean", expected)
    part = "train" if carved else "."
    runs = [
        hfft.finetune(recipe(tmp_path, name, tmp_path / name / part, splits={"train": "train"}))
        for name in ("hostile", "clean")
    ]
    first, second = runs
    weights = [(run.model_dir / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    pd.testing.assert_frame_equal(first.predictions, second.predictions)
    data = [json.loads((run.folder / "data.json").read_text()) for run in runs]
    assert data[0]["splits"] == data[1]["splits"]
    broken = {file for kind, files in expected if kind == "broken" for file in files}
    listed = {skip["file"] if not carved else f"train/{skip['file']}" for skip in first.skipped}
    assert listed == {file for file in broken if file.startswith("train/") or not carved}
    assert second.skipped == []
    assert {f["kind"] for f in data[0]["findings"]} - {f["kind"] for f in data[1]["findings"]} == {"broken"}


def test_an_evaluation_of_new_data_leaves_out_the_same(checkpoint, tmp_path, capfd):
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    hostile.make_clean(tmp_path / "photos")
    run = hfft.finetune(recipe(tmp_path, "r", tmp_path / "photos"))
    found = hostile.make_hostile(tmp_path / "hostile", hostile.BROKEN)
    hostile.clean(tmp_path / "hostile", tmp_path / "clean", found)
    dirty, clean = (hfft.evaluate(run.folder, data=str(tmp_path / name), workers=0) for name in ("hostile", "clean"))
    assert dirty.files == clean.files
    assert (dirty.probabilities == clean.probabilities).all()
    with pytest.raises(hfft.HfftError, match=f"{len(hostile.BROKEN)} files are no readable image"):
        hfft.evaluate(run.folder, data=str(tmp_path / "hostile"), bad_images="stop")
    own = hfft.evaluate(run.folder, workers=0)
    assert own.metrics == run.metrics["test"]


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
@pytest.mark.parametrize("family", ["vit", "timm_wrapper"])
def test_a_trained_model_keeps_its_fit_in_pipelines_too(family, fit, tmp_path):
    tiny.save(tmp_path / "checkpoint", family)
    hostile.make_clean(tmp_path / "photos")
    options = {"fit": fit, "background": [9, 8, 7], "augment": {}}
    run = hfft.finetune(recipe(tmp_path, "r", tmp_path / "photos", **options))
    classify = hfft.Classifier.from_pretrained(run.model_dir)
    table = run.predictions.query("split == 'test'")
    image = str(tmp_path / "photos" / table["file"].iloc[0])
    (answer,) = classify([image], top=3)
    assert answer.probability == pytest.approx(table["probability"].iloc[0], abs=1e-6)
    plain = {
        one["label"]: one["score"] for one in pipeline("image-classification", str(run.model_dir))(image, top_k=3)
    }
    assert plain == pytest.approx(answer.top, abs=1e-5)
    assert classify.transform.pixels(PillowImage.new("RGBA", (60, 60))).reshape(3, -1).T.tolist() == [[9, 8, 7]] * 1024
