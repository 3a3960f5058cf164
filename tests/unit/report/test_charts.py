import re
from dataclasses import replace
from xml.etree import ElementTree

import finished
import matplotlib
import pytest

from hfft.report.charts import coverage_chart, curve_charts, reliability_chart, retention_chart
from hfft.runs.facts import read_facts


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_facts(finished.make_run(tmp_path_factory.mktemp("charts") / "run"))


@pytest.fixture(scope="module")
def curves(facts):
    return curve_charts(facts.phases)


def tips(chart):
    return re.findall(r'data-tip="([^"]*)"', chart.svg)


def texts(chart):
    return re.findall(r"<text[^>]*>([^<]*)<", chart.svg)


def test_colours_and_letters_are_the_pages_own(curves):
    for chart in curves:
        colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart.svg))
        assert colors <= {"none", *(f"var(--{name})" for name in ("ink", "muted", "line", "first", "second", "third"))}
        assert "font" not in chart.svg
        assert "<style" not in chart.svg
        root = ElementTree.fromstring(chart.svg)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib


def test_every_logged_number_is_a_dot_that_tells_it(facts, curves):
    loss, scores = curves
    assert tips(loss) == [
        *("head, epoch 0.5, step 5: training 0.7000", "head, epoch 1, step 10, kept: validation 0.6000"),
        *("head, epoch 2, step 20: validation 0.6500", "last, epoch 0.5, step 5: training 0.7000"),
        *("last, epoch 1, step 10, kept: validation 0.6000", "last, epoch 2, step 20: validation 0.6500"),
    ]
    assert [tip for tip in tips(scores) if "macro F1" in tip and "kept" in tip] == [
        *("head, epoch 1, step 10, kept: macro F1 0.7000", "last, epoch 1, step 10, kept: macro F1 0.7000"),
    ]
    assert {"head", "last", "training", "validation"} <= set(texts(loss))


def test_the_phases_are_told_where_they_cannot_be_seen(curves):
    assert curves[0].alt == "Loss: training, validation by epoch, through head, last"


def test_phases_without_a_log_have_no_curves(facts):
    silent = replace(facts.phases[0], history=())
    assert curve_charts([silent, silent]) == []
    assert len(curve_charts([silent, facts.phases[1]])) == 2


def test_the_reliability_diagram_tells_its_bins(facts):
    chart = reliability_chart(facts.splits["test"])
    assert tips(chart) == ["8 images with a probability of 0.9 to 1.0: 0.900 on average, 0.750 right"]
    assert "0.90 said, 0.75 right" in chart.alt


def test_what_is_won_by_silence():
    curve = {"coverage": [0.25, 0.5, 0.75, 1.0], "risk": [0.0, 0.125, 0.25, 0.375]}
    chart = coverage_chart({"risk_coverage": curve})
    assert "the surest 50.0% of the images: 12.5% wrong" in tips(chart)
    assert chart.alt == "Risk by coverage: 12.5% wrong in the surest half, 37.5% in all"


def test_blocks_without_a_number_are_left_out():
    blocks = {"last": {"block 0": {"cka": None}, "block 1": {"cka": 0.5}}, "all": {"block 0": {"cka": 0.25}}}
    chart = retention_chart(blocks, "cka", "Similarity")
    assert tips(chart) == ["block 1 after last: 0.500", "block 0 after all: 0.250"]


def test_the_same_run_gives_the_same_chart_whatever_the_users_style(facts, curves):
    with matplotlib.rc_context(
        {"font.size": 20, "axes.facecolor": "black", "lines.linewidth": 9, "svg.fonttype": "path"}
    ):
        assert curve_charts(facts.phases) == curves
