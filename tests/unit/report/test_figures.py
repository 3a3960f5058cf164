import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import finished
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hfft.report import figures as figures_module
from hfft.report.figures import draw_confusion, draw_learning_curves, draw_reliability, write_figures
from hfft.report.fonts import letter
from hfft.runs.facts import read_facts

NAMES = ["confusion_test", "confusion_validation", "learning_curves", "reliability_test"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_facts(finished.make_run(tmp_path_factory.mktemp("figures") / "run"))


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def many(facts, count):
    labels = tuple(f"class {number}" for number in range(count))
    confusion = {label: {label: 30, labels[number - 1]: 2} for number, label in enumerate(labels)}
    return replace(facts.splits["test"], confusion=confusion), labels


def test_all_that_was_measured_is_drawn_as_png_and_svg(facts):
    written = write_figures(facts)
    assert sorted(path.stem for path in written) == sorted([*NAMES, *NAMES])
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert all(path.parent == facts.folder / "figures" and path.stat().st_size > 1000 for path in written)


def test_the_same_run_gives_the_same_bytes_whatever_the_users_style(facts):
    before = {path.name: path.read_bytes() for path in write_figures(facts)}
    assert not any(b"<dc:date>" in content for content in before.values())
    with matplotlib.rc_context(
        {"font.size": 20, "axes.facecolor": "black", "text.usetex": False, "lines.linewidth": 9}
    ):
        again = {path.name: path.read_bytes() for path in write_figures(facts)}
    assert again == before


def test_the_background_is_white(facts):
    write_figures(facts)
    for name in NAMES:
        image = Image.open(facts.folder / "figures" / f"{name}.png").convert("RGB")
        assert image.getpixel((1, 1)) == image.getpixel((image.width - 2, image.height - 2)) == (255, 255, 255)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_around_the_axes_is_cut_off(facts, monkeypatch, name):
    drawn = {}
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **more: (drawn.update({path: self}), save(self, path, **more))
    )
    write_figures(facts)
    figure = next(figure for path, figure in drawn.items() if path.name == f"{name}.png")
    figure.set_dpi(150)
    outline, written = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert outline.x0 <= written.x0 <= written.x1 <= outline.x1
    assert outline.y0 <= written.y0 <= written.y1 <= outline.y1


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


@pytest.mark.parametrize(
    "labels", [("$a$ $5", "x_$_y"), ("猫", "犬"), ("Käfer", "naïve ☃"), ("a\nb", "x" * 90)], ids=str
)
def test_no_name_of_a_class_makes_a_warning(facts, labels):
    split = replace(facts.splits["test"], confusion={label: {label: 3} for label in labels})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_figures(replace(facts, labels=labels, splits={"test": split}, phases=()))


def test_a_name_that_no_font_has_is_told_by_its_output():
    lettering = letter(["plain", "\U0001e900\U0001e901", "Käfer"])  # Adlam, which the fonts of a server don't have
    assert lettering.names in (("plain", "#1", "Käfer"), ("plain", "\U0001e900\U0001e901", "Käfer"))
    assert letter(["\U0010fffd", "x"]).names == ("#0", "x")  # of a private plane: nobody's


def test_a_long_name_keeps_both_ends():
    (name,) = letter(["Tomato___Tomato_Yellow_Leaf_Curl_Virus"]).names
    assert name.startswith("Tomato___Tom")
    assert name.endswith("_Virus")
    assert len(name) <= 24


def test_curves_stand_one_phase_after_the_other_and_mark_what_was_kept(facts):
    upper, lower = draw_learning_curves(facts.phases).axes
    assert [text.get_text() for text in upper.texts] == ["head", "last"]
    lines = {line.get_label(): line for line in lower.get_lines()}
    np.testing.assert_array_equal(lines["accuracy"].get_xdata(), [1, 2])
    second = [line for line in lower.get_lines() if list(line.get_ydata()) == [0.75, 0.7]][1]
    np.testing.assert_array_equal(second.get_xdata(), [3, 4])  # 2 epochs of the phase before
    rings = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in lower.get_lines() if line.get_fillstyle() == "none"
    ]
    assert rings == [(1, 0.75), (1, 0.7), (3, 0.75), (3, 0.7)]


def test_a_phase_without_a_log_leaves_its_place_empty(facts):
    silent = replace(facts.phases[0], history=())
    upper, _ = draw_learning_curves([silent, facts.phases[1]]).axes
    assert upper.get_legend_handles_labels()[1] == ["training", "validation"]
    assert "learning_curves" not in {path.stem for path in write_figures(replace(facts, phases=(silent, silent)))}


def test_the_reliability_diagram_shows_the_bins(facts):
    split = facts.splits["test"]
    upper, lower = draw_reliability(split).axes
    measured = next(line for line in upper.get_lines() if line.get_label() == "measured")
    assert list(measured.get_ydata()) == [part.accuracy for part in split.bins] == [0.75]
    assert [bar.get_height() for bar in lower.patches] == [8]


def test_figures_open_no_window_and_leave_pyplot_alone():
    assert "pyplot" not in vars(figures_module)
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()
