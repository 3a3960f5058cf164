import json

import pytest
from finished import make_run

from hfft.report.card import write_report

PHASE = {
    "changed": ["block 3"],
    "old_task": {"classes": 1000, "agreement": 0.484, "kl_divergence": 0.3126},
    "knn_accuracy": {"before": 0.8085, "after": 0.8164},
    "head_input": {"cka": 0.9505, "cosine_drift": 0.1147},
}
HEAD = {
    "changed": [],
    "old_task": {"classes": 1000, "agreement": 1.0, "kl_divergence": 0.0},
    "knn_accuracy": {"before": 0.8085, "after": 0.8085},
    "head_input": {"cka": 1.0, "cosine_drift": 0.0},
}
SAMPLE = {"split": "validation", "images": 200}
INTERPOLATION = {"alpha": 0.3, "metric": "log_loss", "images": 394, "curve": []}


def card(folder, **options):
    return (make_run(folder / "run", **options) / "model" / "README.md").read_text()


def test_the_card_says_what_is_left_after_each_phase_and_how_far_the_weights_went(tmp_path):
    retention = {"sample": SAMPLE, "phases": {"head": HEAD, "last": PHASE}}
    text = card(tmp_path, more={"retention": retention, "interpolation": INTERPOLATION})
    assert "on 200 validation images" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["head", "1.000", "0.000", "0.000", "1.000", "0.808"] in rows
    assert ["last", "0.484", "0.313", "0.115", "0.951", "0.816"] in rows
    assert "The weights lie 0.3 of the way" in text
    assert "chosen by log loss on 394 validation images" in text


def test_without_an_old_task_there_is_no_column_for_it(tmp_path):
    retention = {"sample": SAMPLE, "phases": {"last": {**PHASE, "old_task": None, "head_input": None}}}
    text = card(tmp_path, more={"retention": retention})
    assert "old head" not in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["last", "-", "-", "0.816"] in rows
    assert "The weights lie" not in text


def test_an_encoder_that_no_phase_changed_needs_no_table(tmp_path):
    assert "pretrained encoder" not in card(tmp_path, more={"retention": {"sample": SAMPLE, "phases": {"head": HEAD}}})


def test_the_card_names_the_temperature_of_config_json(tmp_path):
    text = card(tmp_path)  # three of four answers are right, with a probability of 0.9 each
    kept = json.loads((tmp_path / "run/model/config.json").read_text())["hfft"]["temperature"]
    assert kept == pytest.approx(2, abs=0.001)  # odds of 9 to 1 become the 3 to 1 that they are
    assert "Divided by a temperature of 2.000, fitted on 8 validation images" in text
    assert "expected calibration error (15 bins) of 0.000 instead of 0.150" in text


def test_a_card_without_validation_images_or_of_an_older_run_says_nothing_of_it(tmp_path):
    assert "temperature" not in card(tmp_path, counts={"train": 8, "test": 4})
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    write_report(tmp_path / "run", metrics=metrics)
    assert "temperature" not in (tmp_path / "run/model/README.md").read_text()
