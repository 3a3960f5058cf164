import shutil
from dataclasses import replace

import finished
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hfft.data.sources.reading import ImageData
from hfft.errors import ModelError
from hfft.evaluators import attribution
from hfft.evaluators.attribution import choose_mistakes, read_mistakes
from hfft.runs.facts import SourceFacts, read_facts
from hfft.runs.record import MISTAKES
from hfft.system.files import read_json


def keep_mistakes(facts, images=None):
    def open_model(folder):
        raise ModelError("no weights")

    return attribution.keep_mistakes(facts, images, open_model=open_model)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return finished.make_run(tmp_path_factory.mktemp("mistakes") / "run")


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def set_answers(run, probabilities):
    """Probabilities (N, 2) for the test images, of which the first half are ants, in the order of the table."""
    path = run / "predictions.parquet"
    table = pd.read_parquet(path)
    rows = table.index[table["split"] == "test"]
    names = np.array(["ant", "bee"])
    values = np.asarray(probabilities)
    table.loc[rows, "probability ant"], table.loc[rows, "probability bee"] = values[:, 0], values[:, 1]
    table.loc[rows, "probability"] = values.max(axis=1)
    table.loc[rows, "prediction"] = names[values.argmax(axis=1)]
    table.to_parquet(path)


def test_the_surest_wrong_answers_come_first_with_both_probabilities(run):
    right, wrong = [0.75, 0.25], [[0.375, 0.625], [0.125, 0.875]]
    set_answers(run, [right, wrong[0], right, wrong[1], [0.25, 0.75], [0.25, 0.75], [0.5625, 0.4375], [0.25, 0.75]])
    found = choose_mistakes(read_facts(run))
    assert (found.split, found.images, found.wrong) == ("test", 8, 3)
    seen = [(one.file, one.label, one.prediction, one.label_probability, one.probability) for one in found.shown]
    assert seen == [
        ("0/3", "ant", "bee", 0.125, 0.875),
        ("0/1", "ant", "bee", 0.375, 0.625),
        ("1/2", "bee", "ant", 0.4375, 0.5625),
    ]


def test_a_run_without_mistakes_has_none_to_show(run):
    set_answers(run, [[0.75, 0.25]] * 4 + [[0.25, 0.75]] * 4)
    found = keep_mistakes(read_facts(run))
    assert (found.wrong, found.shown) == (0, ())
    assert read_mistakes(run) == found


def rows_of(label_of_fourth=0):
    rows = finished._rows(("ant", "bee"), 4, finished.PICTURE)
    labels = [label_of_fourth if place == 3 else label for place, label in enumerate(rows["label"])]
    return ImageData({"test": rows.remove_columns("label").add_column("label", labels)}, ("ant", "bee"))


def test_pictures_are_written_once_and_kept(run):
    facts = read_facts(run)
    found = keep_mistakes(facts, rows_of())
    assert [one.picture for one in found.shown] == ["0.jpg", "1.jpg"]
    assert Image.open(run / MISTAKES / "0.jpg").size == (8, 8)
    assert read_json(run / MISTAKES / "mistakes.json")["shown"][0]["file"] == found.shown[0].file
    before = (run / MISTAKES / "mistakes.json").stat().st_mtime_ns
    assert keep_mistakes(facts) == found  # without images
    assert (run / MISTAKES / "mistakes.json").stat().st_mtime_ns == before


def test_pictures_belong_to_the_predictions_at_hand(run):
    before = keep_mistakes(read_facts(run), rows_of())
    set_answers(run, [[0.25, 0.75]] * 8)  # all four ants are wrong
    found = keep_mistakes(read_facts(run), rows_of())
    assert (before.wrong, found.wrong) == (2, 4)
    assert sorted(path.name for path in (run / MISTAKES).glob("*.jpg")) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_an_image_with_another_label_now_is_not_shown(run):
    found = keep_mistakes(read_facts(run), rows_of(label_of_fourth=1))
    by_file = {one.file: one for one in found.shown}
    assert by_file["0/3"].picture is None
    assert "not among the images any more" in by_file["0/3"].missing
    assert by_file["1/3"].picture is not None


def test_a_model_that_cannot_be_opened_costs_the_overlays_alone(run):
    found = keep_mistakes(read_facts(run), rows_of())
    assert all(one.picture and one.overlay is None for one in found.shown)
    assert found.block == ""
    assert found.no_overlay == "no weights"


def test_images_that_were_in_memory_are_not_looked_for(run):
    found = keep_mistakes(replace(read_facts(run), data=SourceFacts("memory", "x", None)))
    assert {one.missing for one in found.shown} == {"the images were in memory when the run was made"}


def test_a_spoiled_list_is_made_anew(run):
    facts = read_facts(run)
    wanted = keep_mistakes(facts, rows_of())
    (run / MISTAKES / "mistakes.json").write_text('{"shown": [{"wrong": 1}]}')
    assert read_mistakes(run) is None
    assert keep_mistakes(facts, rows_of()) == wanted
