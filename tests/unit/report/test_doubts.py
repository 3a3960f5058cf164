"""Label hints on the page: pictures of the first of them, or why there are none."""

import json
import shutil

import finished
import pytest
from pages import Page

from hfft.data.sources.reading import ImageData
from hfft.report.doubts import keep_doubts
from hfft.report.page import render_page
from hfft.runs.facts import read_facts
from hfft.runs.record import HINT_PICTURES

IMAGES = ImageData({"train": finished._rows(("ant", "bee"), 20, finished.PICTURE)}, ("ant", "bee"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return finished.make_run(tmp_path_factory.mktemp("doubts") / "run")


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def note(run, *files, left_out=None):
    hints = [
        {"rank": n, "row": n, "file": file, "label": "ant", "label_probability": 0.125}
        | {"believed": "bee", "believed_probability": 0.75}
        for n, file in enumerate(files, start=1)
    ]
    content = {"left_out": left_out, "images": 40, "folds": 5, "accuracy": 0.9, "seconds": 1.0, "hints": hints}
    (run / "label_issues.json").write_text(json.dumps(content))


def shown(run, images=None):
    facts = read_facts(run)
    return Page.of(render_page(facts, None, keep_doubts(facts, images)))


def test_the_least_believed_stand_with_their_pictures(run):
    note(run, *(f"0/{n}" for n in range(14)))
    words = shown(run, IMAGES).words
    assert "14 of 40 training images look like another class" in words
    assert "here are the 12 whose label it believes least" in words
    assert "ant may be bee 0.750 bee, 0.125 ant 0/0" in words
    assert "0/12" not in words
    assert "No picture" not in words
    assert {path.name for path in (run / HINT_PICTURES).iterdir()} == {"hints.json", *(f"{n}.jpg" for n in range(12))}


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
    assert "Least believed" not in shown(run).words
    note(run)
    assert "every label of 40 training images is believed" in shown(run).words
    note(run, left_out="an image has more than one label")
    assert "They were not looked for: an image has more than one label" in shown(run).words
    assert not (run / HINT_PICTURES).exists()
