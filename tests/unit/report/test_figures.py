import re
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import finished
import matplotlib
import numpy as np
import pytest
import warm
from matplotlib.figure import Figure
from PIL import Image

from hfft.report.confusion import draw_confusion, letter
from hfft.report.figures import learning_curves, reliability, retention_by_block, risk_by_coverage, write_figures
from hfft.runs.facts import read_facts

NAMES = ["confusion_test", "confusion_validation", "learning_curves", "reliability_test"]
STYLE = {"font.size": 20, "axes.facecolor": "black", "text.usetex": False, "lines.linewidth": 9}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_facts(finished.make_run(tmp_path_factory.mktemp("figures") / "run"))


@pytest.fixture(scope="module")
def written(facts):
    """The files, and by name the outline of each figure and that of all that was drawn in it."""
    outlines, save = {}, Figure.savefig

    def measured(figure, path, **more):
        outlines[path.stem] = (figure.bbox_inches, figure.get_tightbbox())
        save(figure, path, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", measured)
        return write_figures(facts), outlines


@pytest.fixture(scope="module")
def curves(facts):
    return learning_curves(facts.phases)


def tips(chart):
    return re.findall(r'data-tip="([^"]*)"', chart.svg)


def words(chart):
    return re.findall(r"<text[^>]*>([^<]*)<", chart.svg)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def many(facts, count):
    labels = tuple(f"class {number}" for number in range(count))
    confusion = {label: {label: 30, labels[number - 1]: 2} for number, label in enumerate(labels)}
    return replace(facts.splits["test"], confusion=confusion), labels


def test_all_that_was_measured_is_drawn_as_png_and_svg_on_white(facts, written):
    files, _ = written
    assert sorted(path.stem for path in files) == sorted([*NAMES, *NAMES])
    assert {path.suffix for path in files} == {".png", ".svg"}
    assert all(path.parent == facts.folder / "figures" and path.stat().st_size > 1000 for path in files)
    for name in NAMES:
        image = Image.open(facts.folder / "figures" / f"{name}.png").convert("RGB")
        assert image.getpixel((1, 1)) == image.getpixel((image.width - 2, image.height - 2)) == (255, 255, 255)


def test_the_same_run_gives_the_same_bytes_whatever_the_users_style(facts, written, curves):
    before = {path.name: path.read_bytes() for path in written[0]}
    assert not any(b"<dc:date>" in content for content in before.values())
    shown = curves.svg
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path"}):
        again = {path.name: path.read_bytes() for path in write_figures(facts)}
        assert learning_curves(facts.phases).svg == shown
    assert again == before


def test_nothing_around_the_axes_is_cut_off(written):
    _, outlines = written
    assert sorted(outlines) == NAMES
    for name, (outline, drawn) in outlines.items():
        assert outline.x0 <= drawn.x0 <= drawn.x1 <= outline.x1, name
        assert outline.y0 <= drawn.y0 <= drawn.y1 <= outline.y1, name


def test_cells_hold_the_counts(facts):
    figure = draw_confusion(facts.splits["test"], facts.labels)
    assert texts(figure) == ["3", "1", "1", "3"]
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["ant", "bee"]
    top, bottom = axes.get_ylim()[::-1]
    assert top < bottom  # the first class is the upper row


@pytest.mark.parametrize(
    ("count", "has_counts", "has_names"), [(20, True, True), (100, False, True), (300, False, False)]
)
def test_many_classes_have_fewer_words(facts, count, has_counts, has_names):
    figure = draw_confusion(*many(facts, count))
    assert len(texts(figure)) == (count**2 if has_counts else 0)
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert (names == [f"class {number}" for number in range(count)]) is has_names


def test_names_of_100_classes_do_not_run_into_each_other(facts):
    figure = draw_confusion(*many(facts, 100))
    figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_no_name_of_a_class_makes_a_warning(facts):
    labels = ("$a$ $5", "x_$_y", "猫", "犬", "Käfer", "naïve ☃", "a\nb", "x" * 90)
    split = replace(facts.splits["test"], confusion={label: {label: 3} for label in labels})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_figures(replace(facts, labels=labels, splits={"test": split}, phases=()))


def test_a_name_that_no_font_has_is_told_by_its_output():
    _, names = letter(["plain", "\U0001e900\U0001e901", "Käfer"])  # Adlam, which the fonts of a server don't have
    assert names in (("plain", "#1", "Käfer"), ("plain", "\U0001e900\U0001e901", "Käfer"))
    assert letter(["\U0010fffd", "x"])[1] == ("#0", "x")  # of a private plane: nobody's


def test_a_long_name_keeps_both_ends():
    _, (name,) = letter(["Tomato___Tomato_Yellow_Leaf_Curl_Virus"])
    assert name.startswith("Tomato___To")
    assert name.endswith("_Virus")
    assert len(name) <= 22


def test_figures_open_no_window_and_leave_pyplot_alone(facts):
    """In a process of its own, as other tests may have imported it."""
    code = (
        "import sys; from hfft.report.figures import write_figures; from hfft.runs.facts import read_facts; "
        "write_figures(read_facts(sys.argv[1])); print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(facts.folder)]
    assert warm.run(command).stdout == "False\n"


def test_colours_and_letters_are_the_pages_own(facts, curves):
    for chart in (curves, reliability(facts.splits["test"])):
        colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart.svg))
        assert colors <= {"none", *(f"var(--{name})" for name in ("ink", "muted", "line", "first", "second", "third"))}
        assert "font" not in chart.svg
        assert "<style" not in chart.svg
        root = ElementTree.fromstring(chart.svg)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib


def test_every_logged_number_is_a_dot_that_tells_it(curves):
    found = tips(curves)
    assert found[:6] == [
        *("head, epoch 0.5, step 5: training 0.7000", "head, epoch 1, step 10, kept: validation 0.6000"),
        *("head, epoch 2, step 20: validation 0.6500", "last, epoch 0.5, step 5: training 0.7000"),
        *("last, epoch 1, step 10, kept: validation 0.6000", "last, epoch 2, step 20: validation 0.6500"),
    ]
    assert [tip for tip in found if "macro F1" in tip and "kept" in tip] == [
        *("head, epoch 1, step 10, kept: macro F1 0.7000", "last, epoch 1, step 10, kept: macro F1 0.7000"),
    ]
    assert {"head", "last", "training", "validation", "accuracy", "macro F1"} <= set(words(curves))
    shown = "Loss: training, validation; scores: accuracy, macro F1"
    assert curves.alt == f"{shown}, by epoch, through head, last"


def test_curves_stand_one_phase_after_the_other_and_mark_what_was_kept(curves):
    upper, lower = curves.figure.axes
    assert [text.get_text() for text in upper.texts] == ["head", "last"]
    accuracy = [line for line in lower.get_lines() if list(line.get_ydata()) == [0.75, 0.7]]
    np.testing.assert_array_equal(accuracy[0].get_xdata(), [1, 2])
    np.testing.assert_array_equal(accuracy[1].get_xdata(), [3, 4])  # 2 epochs of the phase before
    large = [dots.get_offsets()[dots.get_sizes() > 30].tolist() for dots in lower.collections]
    assert large == [[[1, 0.75]], [[1, 0.7]], [[3, 0.75]], [[3, 0.7]]]


def test_a_phase_without_a_log_leaves_its_place_empty(facts):
    silent = replace(facts.phases[0], history=())
    assert learning_curves([silent, silent]) is None
    upper, _ = learning_curves([silent, facts.phases[1]]).figure.axes
    assert upper.get_legend_handles_labels()[1] == ["training", "validation"]
    assert "learning_curves" not in {path.stem for path in write_figures(replace(facts, phases=(silent, silent)))}


def test_the_reliability_diagram_shows_the_bins(facts):
    chart = reliability(facts.splits["test"])
    upper, lower = chart.figure.axes
    assert list(upper.get_lines()[1].get_ydata()) == [0.75]
    assert [bar.get_height() for bar in lower.patches] == [8]
    assert tips(chart) == ["8 images with a probability of 0.9 to 1.0: 0.900 on average, 0.750 right"]
    assert "0.90 said, 0.75 right" in chart.alt


def test_what_is_won_by_silence():
    curve = {"coverage": [0.25, 0.5, 0.75, 1.0], "risk": [0.0, 0.125, 0.25, 0.375]}
    chart = risk_by_coverage({"risk_coverage": curve})
    assert "the surest 50.0% of the images: 12.5% wrong" in tips(chart)
    assert chart.alt == "Risk by coverage: 12.5% wrong in the surest half, 37.5% in all"


def test_blocks_without_a_number_are_left_out():
    blocks = {"last": {"block 0": {"cka": None}, "block 1": {"cka": 0.5}}, "all": {"block 0": {"cka": 0.25}}}
    chart = retention_by_block(blocks, "cka", "Similarity")
    assert tips(chart) == ["block 1 after last: 0.500", "block 0 after all: 0.250"]
