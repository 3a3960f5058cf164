import dataclasses

import pytest
from pages import Page

from hfft.commands.compare import Comparison, Pair, Row
from hfft.errors import TrainingError
from hfft.metrics.paired_tests import McNemar
from hfft.report.page import render_comparison, write_comparison


def row(run, accuracy, **changes):
    metrics = {
        name: {"value": value, "low": value - 0.125, "high": value + 0.125}
        for name, value in (("accuracy", accuracy), ("log_loss", 1 - accuracy))
    }
    left = {"agreement": 0.5, "drift": 0.25, "cka": None, "nearest": 0.625}
    return dataclasses.replace(Row(run, 40, metrics, {}, "last", 1234, 75.0, left), **changes)


def found(*rows, pair=None, notes=()):
    return dataclasses.asdict(Comparison("test", rows, pair, notes))


def test_the_most_accurate_run_is_told_first_and_all_are_listed():
    page = Page.of(render_comparison(found(row("runs/a", 0.5), row("runs/b", 0.75))))
    assert "The highest accuracy 75.0 % b" in page.words
    assert "a 0.500 0.375 to 0.625 0.500 0.375 to 0.625 40 last 1,234 1 min 15 s" in page.words
    assert "similarity (CKA)" not in page.words  # which no run has measured
    assert page.all("table", id="retention-table")
    assert [head["aria-sort"] for head in page.all("th") if "aria-sort" in head] == ["none"] * (7 + 4)


def test_runs_that_measure_other_things_are_compared_by_what_they_share():
    value = {"value": 0.5, "low": 0.25, "high": 0.75}
    sets = row("runs/sets", 0.5, metrics={"mean_average_precision": value, "macro_f1": value})
    one = row("runs/one", 0.5)
    one = dataclasses.replace(one, metrics={**one.metrics, "macro_f1": {**value, "value": 0.625}})
    page = Page.of(render_comparison(found(one, sets)))
    assert "The highest macro F1 62.5 % one" in page.words
    assert "sets - - 0.500 0.250 to 0.750" in page.words


def test_folders_are_named_by_what_tells_them_apart():
    page = Page.of(render_comparison(found(row("/home/alice/one/bugs", 0.5), row("/home/alice/two/bugs", 0.75))))
    assert "one/bugs" in page.words
    assert "alice" not in page.words


def test_the_same_run_twice_is_still_a_page():
    page = Page.of(render_comparison(found(row("runs/a", 0.5), row("runs/a", 0.5))))
    assert page.words.count(" a 0.500 0.375 to 0.625") == 2


def test_runs_that_measured_nothing_of_retention_have_no_such_table():
    page = Page.of(render_comparison(found(row("a", 0.5, retention={}), row("b", 0.5, retention={}))))
    assert page.all("table", id="retention-table") == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("accuracy", (0.25, 0.125, 0.375), "b is better"),
        ("accuracy", (-0.25, -0.375, -0.125), "a is better"),
        ("log_loss", (0.25, 0.125, 0.375), "a is better"),
        ("log_loss", (-0.25, -0.375, -0.125), "b is better"),
        ("accuracy", (0.25, -0.125, 0.375), "no clear difference"),
    ],
)
def test_of_two_runs_it_says_which_is_better_if_that_is_clear(name, value, words):
    differences = {name: dict(zip(("value", "low", "high"), value, strict=True))}
    pair = Pair("x/a", "x/b", 40, differences, McNemar(2, 7, 0.1796875))
    page = Page.of(render_comparison(found(row("x/a", 0.5), row("x/b", 0.75), pair=pair)))
    assert f"{value[0]:+.3f} {value[1]:+.3f} to {value[2]:+.3f} {words}" in page.words
    assert "Right on 7 images where a is wrong, wrong on 2 where it is right: McNemar's exact p = 0.18" in page.words


def test_hostile_names_and_notes_are_shown_and_not_run():
    nasty = "<img src=x onerror=alert(1)>"
    page = Page.of(render_comparison(found(row(nasty, 0.5), row("b", 0.5), notes=(f"{nasty} has other classes",))))
    assert page.all("img") == []
    assert f"{nasty} has other classes" in page.words


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(TrainingError, match=r"page\.html: can't be written"):
        write_comparison(found(row("a", 0.5), row("b", 0.5)), tmp_path / "page.html")


def test_too_few_images_are_no_verdict_and_no_number():
    unknown = {"value": 0.5, "low": None, "high": None}
    rows = [dataclasses.replace(row(run, 0.5), metrics={"accuracy": unknown, "log_loss": unknown}) for run in "ab"]
    pair = Pair("a", "b", 5, {"accuracy": unknown}, McNemar(0, 0, 1.0))
    page = Page.of(render_comparison(found(*rows, pair=pair)))
    assert "95 % interval: too few images" in page.words
    assert "accuracy +0.500 too few images too few images to say" in page.words
    assert "None" not in page.words
