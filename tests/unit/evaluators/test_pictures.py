"""Label issues on the page: pictures of the first of them, or why there are none."""

import json
import shutil

import finished
import pytest
from pages import Page

from hfft.data.sources.reading import ImageData
from hfft.evaluators.pictures import keep_label_pictures, read_label_issues
from hfft.report.page import render_page
from hfft.runs.facts import read_facts
from hfft.runs.record import LABEL_PICTURES

IMAGES = ImageData({"train": finished._rows(("ant", "bee"), 20, finished.PICTURE)}, ("ant", "bee"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return finished.make_run(tmp_path_factory.mktemp("labels") / "run")


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def note(run, *files, left_out=None, name="label_issues.json"):
    hints = [
        {"rank": n, "row": n, "file": file, "label": "ant", "label_probability": 0.125}
        | {"believed": "bee", "believed_probability": 0.75}
        for n, file in enumerate(files, start=1)
    ]
    content = {"left_out": left_out, "images": 40, "folds": 5, "accuracy": 0.9, "seconds": 1.0, "hints": hints}
    (run / name).write_text(json.dumps(content))


def shown(run, images=None):
    facts = read_facts(run)
    keep_label_pictures(facts, images)
    return Page.of(render_page(facts, None, read_label_issues(run)))


def test_those_that_look_most_wrong_stand_with_their_pictures(run):
    note(run, *(f"0/{n}" for n in range(14)))
    words = shown(run, IMAGES).words
    assert "14 of 40 training labels look wrong" in words
    assert "here are the 12 that look most wrong" in words
    assert "ant may be bee 0.750 bee, 0.125 ant 0/0" in words
    assert "0/12" not in words
    assert "No picture" not in words
    assert {path.name for path in (run / LABEL_PICTURES).iterdir()} == {"shown.json", *(f"{n}.jpg" for n in range(12))}


def test_pictures_outlive_the_images_but_not_another_list(run):
    note(run, "0/1", "0/2")
    shown(run, IMAGES)
    assert "No picture" not in shown(run).words
    note(run, "0/3")
    assert "No picture: the images can't be read where the recipe says" in shown(run).words


def test_images_that_are_gone_or_have_another_label_now(run):
    note(run, "0/1", "1/1", "gone")
    words = shown(run, IMAGES).words
    assert words.count("No picture: it is not among the images any more") == 2


def test_none_and_none_looked_for(run):
    assert "Labels that look wrong" not in shown(run).words
    note(run)
    assert "None of 40 training labels looks wrong" in shown(run).words
    note(run, left_out="an image has more than one label")
    assert "They were not looked for: an image has more than one label" in shown(run).words
    assert not (run / LABEL_PICTURES).exists()


def test_the_file_of_an_earlier_version_is_read(run):
    note(run, "0/1", name="label_hints.json")
    assert "ant may be bee 0.750 bee, 0.125 ant 0/1" in shown(run, IMAGES).words
