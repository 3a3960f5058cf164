import base64
import hashlib
import json
import logging
import re
import shutil
from dataclasses import replace

import finished
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from markupsafe import Markup
from pages import Page
from PIL import Image

from hfft.commands.report import make_page, try_page
from hfft.data.sources.reading import ImageData
from hfft.data.sources.rows import row_features
from hfft.errors import ModelError, RunError, TrainingError
from hfft.evaluators.attribution import choose_mistakes, keep_mistakes
from hfft.report.page import _environment, render_page, write_page
from hfft.runs.facts import read_facts
from hfft.runs.record import MISTAKES
from hfft.system.files import read_json

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(2)</script>",
    "{{ 7 * 7 }} & ' onload='alert(3)",
)
LIMIT = 5_000_000  # bytes


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return finished.make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def facts(finished_run):
    return read_facts(finished_run)


@pytest.fixture(scope="module")
def page(facts):
    """The page of the whole run, which most tests read."""
    return shown(facts, choose_mistakes(facts))


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def shown(facts, mistakes=None):
    return Page.of(render_page(facts, mistakes))


def cannot_open(folder):
    raise ModelError("the model of this run has no weights to look with")


def images_of(labels):
    """Those of a finished run, in memory."""
    return ImageData({"test": finished._rows(labels, 4, finished.PICTURE)}, tuple(labels))


def change(path, edit):
    content = read_json(path)
    edit(content)
    path.write_text(json.dumps(content))


def test_the_answer_comes_first(facts, page):
    words = page.words
    accuracy = facts.splits["test"].metrics["accuracy"]
    assert "Accuracy on 8 test images 75.0 %" in words
    assert f"95 % interval: {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %" in words
    parts = ["this model", "What trained", "How long it took", "What is shipped", "All numbers", "Learning curves"]
    assert [words.index(part) for part in parts] == sorted(words.index(part) for part in parts)
    assert "blocks 2-3 of 4, head, then blocks 2-3 of 4, head" in words
    assert "1,234 of 56,789 parameters" in words


def test_every_section_can_be_reached_and_has_a_title(page):
    links = [link["href"] for link in page.all("a")]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert links == [
        *("#answer", "#numbers", "#curves", "#confusion", "#classes", "#trust", "#mistakes"),
        *("#data", "#phases", "#recipe"),
    ]
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", page.words)


def test_the_numbers_are_those_of_the_run(facts, page):
    words, test = page.words, facts.splits["test"]
    recall = test.by_class["bee"].recall
    assert f"0.750 {recall.low:.3f} to {recall.high:.3f}" in words
    assert "1 of 4 images of ant were taken for bee" in words
    assert "0.150 away from the share that is right" in words  # 0.9 said, 0.75 right
    assert "phase head 2.0 s" in words
    assert "name: run" in words


def test_baselines_stand_beside_the_result_the_best_first(facts):
    def row(value):
        return {name: {"value": value, "low": value, "high": value} for name in facts.splits["test"].metrics}

    baselines = {
        "majority": {"about": "always ant", "test": row(0.25)},
        "knn": {"about": "20 nearest", "test": row(0.625)},
        "head": {"about": "left out: too long"},
    }
    words = shown(replace(facts, baselines=baselines, kept="last improved: model/ is that of last")).words
    places = [words.index(part) for part in ("this model 75.0 %", "untrained 62.5 %", "most frequent class 25.0 %")]
    assert places == sorted(places)
    assert "Not measured on these images: head alone (left out: too long)" in words
    assert "model/ of phase last last improved: model/ is that of last." in words


def test_hostile_names_are_shown_and_not_run(tmp_path):
    run = finished.make_run(tmp_path / "run", HOSTILE)
    path = run / "predictions.parquet"
    table = pd.read_parquet(path)
    table["file"] = [f"{name}/<img src=y onerror=alert(4)>.png" for name in table["label"]]
    table.to_parquet(path)
    gone = {"severity": "harm", "kind": "broken", "detail": HOSTILE[0], "files": [HOSTILE[1]], "count": 1}
    change(
        run / "data.json", lambda data: data.update(findings=[gone], skipped=[{"file": HOSTILE[2], "reason": "<b>"}])
    )
    facts = read_facts(run)
    text = render_page(facts, choose_mistakes(facts))
    page = Page.of(text)
    assert [kind for kind, _ in page.scripts] == ["application/json", ""]
    assert "alert" not in page.scripts[1][1]
    assert [one["name"] for one in json.loads(page.scripts[0][1])] == list(HOSTILE)
    assert page.all("img") == []
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for name in HOSTILE:
        assert page.words.count(" ".join(name.split())) >= 4  # classes, confusions, images, mistakes
    assert "onerror=alert(4)" in page.words
    assert "49" not in re.findall(r"\b49\b", page.words)


def test_the_page_may_load_nothing_and_run_its_own_script_alone(page):
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    ((_, script),) = [one for one in page.scripts if one[0] == ""]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    loaded = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "data", "poster")
    ]
    assert all(value.startswith(("#", "data:")) for value in loaded)


def confidence():
    quality = {"log_loss": 0.5, "expected_calibration_error": 0.1}
    return {
        "temperature": 1.25,
        "fitted_on": {"split": "validation", "images": 8, "wrong": 2},
        "measured_on": "test",
        "before": quality,
        "after": quality,
        "risk_coverage": {"coverage": [0.25, 0.5, 1.0], "risk": [0.0, 0.125, 0.25], "aurc": 0.1},
        "thresholds": {
            "0.9": {
                "confidence": 0.625,
                "validation": {"precision": 1.0, "coverage": 0.5},
                "test": {"precision": None, "coverage": 0.0},
            },
            "0.95": None,
        },
    }


def test_what_confidence_is_worth(facts):
    page = shown(replace(facts, confidence=confidence()))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert "temperature of 1.250, fitted on 8 validation images" in page.words
    assert "90 % 0.625 0.0 % - 95 % not reached" in page.words
    assert [one["aria-label"] for one in page.all("figure") if "Risk" in one.get("aria-label", "")] == [
        "Risk by coverage: 12.5% wrong in the surest half, 25.0% in all"
    ]


def test_what_is_left_of_the_pretrained_network(facts, page):
    left = {
        "changed": ["block 2", "block 3"],
        "old_task": {"classes": 5, "agreement": 0.875, "kl_divergence": 0.5},
        "knn_accuracy": {"before": 0.625, "after": 0.75},
        "head_input": {"cka": 0.9375, "cosine_drift": 0.0625},
    }
    retention = {
        "sample": {"split": "validation", "images": 8},
        "phases": {"head": {**left, "changed": []}, "last": left},
    }
    blocks = {
        "last": {"block 0": {"cka": 1.0, "cosine_drift": 0.0}, "head input": {"cka": 0.9375, "cosine_drift": 0.0625}}
    }
    measured = shown(replace(facts, retention=retention, blocks=blocks))
    assert "last 2 parts 0.875 0.500 0.062 0.938 0.750" in measured.words
    tips = [attributes["data-tip"] for _, attributes in measured.elements if "data-tip" in attributes]
    assert "head input after last: 0.062" in tips
    assert "What is left" not in page.words


def test_a_run_without_test_images_is_judged_by_validation(tmp_path):
    run = finished.make_run(tmp_path / "run", counts={"train": 4, "validation": 4})
    facts = read_facts(run)
    words = shown(facts, choose_mistakes(facts)).words
    assert "Accuracy on 8 validation images" in words
    assert "2 of 8 validation images were taken for another class" in words


def test_a_run_without_held_out_images_says_what_is_not_known(tmp_path):
    facts = read_facts(finished.make_run(tmp_path / "run", counts={"train": 8}))
    assert choose_mistakes(facts) is None
    page = shown(facts)
    assert "No images were held out" in page.words
    assert [link["href"] for link in page.all("a")] == ["#answer", "#curves", "#data", "#phases", "#recipe"]


def test_a_run_of_one_phase(tmp_path):
    phases = [{"name": "all", "unfreeze": "all", "learning_rate": 0.01}]
    words = shown(read_facts(finished.make_run(tmp_path / "run", phases=phases))).words
    assert "What is shipped model/" in words
    assert "in the largest phase" not in words


def test_splits_without_a_confusion_leave_its_sections_out(facts):
    metrics = {"mean_average_precision": facts.splits["test"].metrics["macro_f1"]}
    several = replace(
        facts.splits["test"], metrics=metrics, confusion={}, by_class={}, bins=(), calibration_error=None
    )
    page = shown(replace(facts, splits={"test": several}, confidence={}))
    assert "Mean average precision on 8 test images 75.0 %" in page.words
    assert not page.all("svg", tabindex="0")
    by_class = replace(several, by_class=facts.splits["test"].by_class)
    table = shown(replace(facts, splits={"test": by_class})).words
    assert "Class by class" in table
    assert "mistaken" not in table
    assert not {"#confusion", "#classes", "#trust"} & {link["href"] for link in page.all("a")}


@pytest.mark.parametrize(
    ("count", "is_numbered", "is_named"), [(2, True, True), (100, False, True), (300, False, False)]
)
def test_a_matrix_of_few_and_of_many_classes(facts, count, is_numbered, is_named):
    labels = tuple(f"class {number}" for number in range(count))
    row = next(iter(facts.splits["test"].by_class.values()))
    confusion = {label: {label: 30, labels[number - 1]: 2} for number, label in enumerate(labels)}
    counts = dict.fromkeys(labels, 32)
    parts = {
        name: replace(split, confusion=confusion, by_class=dict.fromkeys(labels, row), counts=counts)
        for name, split in facts.splits.items()
    }
    page = shown(replace(facts, labels=labels, splits=parts))
    assert len(page.all("rect", class_="right")) == count
    assert len([rect for rect in page.all("rect") if "data-cell" in rect]) == 2 * count
    assert len([text for text in page.all("text") if "data-cell" in text]) == (2 * count if is_numbered else 0)
    assert len([text for text in page.all("text") if "data-class" in text]) == (2 * count if is_named else 0)


def test_ten_thousand_test_images_are_a_page_that_can_be_sent(tmp_path):
    """Of 100 classes, each of which is taken for each, with pictures that can't be made small."""
    labels = tuple(f"a class with a long name, number {number}" for number in range(100))
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    picture = tmp_path / "noise.png"
    Image.fromarray(noise).save(picture)
    run = finished.make_run(tmp_path / "run", labels, counts={"train": 1, "test": 100})
    change(
        run / "metrics.json",
        lambda metrics: metrics["confusion"].update(test={label: dict.fromkeys(labels, 1) for label in labels}),
    )
    facts = read_facts(run)
    files = [f"{label}/{number}" for label in range(100) for number in range(100)]
    images = [{"path": str(picture), "bytes": None}] * 10_000
    content = {"image": images, "label": np.repeat(np.arange(100), 100).tolist(), "file": files}
    rows = Dataset.from_dict(content, features=row_features(labels))
    mistakes = keep_mistakes(facts, ImageData({"test": rows}, labels), open_model=cannot_open)
    assert mistakes is not None
    assert all(one.picture for one in mistakes.shown)
    for one in mistakes.shown:
        (run / MISTAKES / one.picture.replace(".", "_seen.")).write_bytes((run / MISTAKES / one.picture).read_bytes())
    seen = [replace(one, overlay=one.picture.replace(".", "_seen.")) for one in mistakes.shown]
    text = render_page(facts, replace(mistakes, shown=tuple(seen)))
    page = Page.of(text)
    assert len(page.all("img")) == 48
    assert len([rect for rect in page.all("rect") if "data-cell" in rect]) == 10_000
    assert len(text.encode()) < LIMIT


def test_the_same_run_gives_the_same_bytes(run):
    first = make_page(run, images_of(("ant", "bee"))).read_bytes()
    assert write_page(run).read_bytes() == first  # the pictures are kept in the run


def test_images_that_are_gone_are_said_to_be(tmp_path):
    run = finished.make_run(tmp_path / "run", data={"source": str(tmp_path / "nowhere")})
    words = Page.of(make_page(run).read_text(encoding="utf-8")).words
    assert words.count("No picture: the images can't be read where the recipe says") == 2
    assert "Where the network looked is not shown: the images can't be read where" in words


def test_a_picture_that_was_removed_is_said_to_be_missing(run):
    make_page(run, images_of(("ant", "bee")))
    facts = read_facts(run)
    mistakes = keep_mistakes(facts, open_model=cannot_open)
    (run / MISTAKES / "0.jpg").unlink()
    page = shown(facts, mistakes)
    assert "No picture: its file is gone" in page.words
    assert len(page.all("img")) == 1


def test_findings_of_the_audit_are_listed_by_kind(run, page):
    assert "The audit found nothing" in page.words
    found = [
        {"severity": "note", "kind": "duplicate", "detail": "twice", "files": ["a/1.png", "a/2.png"], "count": 2},
        {"severity": "harm", "kind": "leak", "detail": "in train and test", "files": ["b/1.png"], "count": 2},
    ]
    change(
        run / "data.json", lambda data: data.update(findings=found, skipped=[{"file": "c.png", "reason": "cut off"}])
    )
    words = shown(read_facts(run)).words
    assert words.index("leak: 1") < words.index("duplicate: 1")
    assert "in train and test b/1.png" in words
    assert "c.png : cut off" in words
    change(run / "data.json", lambda data: data.update(findings=[]))
    facts = read_facts(run)
    quiet = replace(facts, recipe=replace(facts.recipe, data=replace(facts.recipe.data, audit="off")))
    assert "audit found" not in shown(quiet).words


def test_no_path_of_the_disk_is_on_the_page(tmp_path):
    home = tmp_path / "alice"
    (home / "photos").mkdir(parents=True)
    run = finished.make_run(home / "run", data={"source": str(home / "photos")}, output_dir=str(home))
    change(
        run / "environment.json",
        lambda one: one.update(command=["/opt/x/hfft", "train", f"{home}/a.yaml", f"output_dir={home}"]),
    )
    page = Page.of(render_page(read_facts(run), None))
    assert "hfft train a.yaml output_dir=alice" in page.words
    assert str(tmp_path) not in page.words


def test_a_run_survives_a_page_that_cannot_be_written(run, caplog):
    (run / "report.html").mkdir()
    with pytest.raises(TrainingError, match=r"report\.html: can't be written: .*`hfft report .*` writes it"):
        make_page(run)
    with caplog.at_level(logging.INFO, logger="hfft"):
        try_page(run, images_of(("ant", "bee")))
    assert f"`hfft report {run}` tries it again" in caplog.text
    (run / "report.html").rmdir()
    with caplog.at_level(logging.INFO, logger="hfft"):
        try_page(run, images_of(("ant", "bee")))
    assert f"report: {run / 'report.html'}" in caplog.text
    assert not list(run.glob(".*partial"))


def test_only_a_finished_run_has_a_page(run):
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        write_page(run)


def test_a_page_shows_control_characters_as_escapes():
    page = _environment().from_string("{{ name }}{{ markup }}").render(name="a\x1b\u202e<", markup=Markup("<b>"))
    assert page == "a\\x1b\\u202e&lt;<b>"
