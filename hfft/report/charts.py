"""Charts of report.html: drawn by matplotlib, as SVG that takes its colours and its font from the page around it."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hfft.report.arranging import arrange
from hfft.report.words import spoken
from hfft.runs.facts import PhaseFacts, SplitFacts

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Stand-ins for matplotlib, which knows no CSS, and what the page calls them.
_INK, _MUTED, _LINE, _PAPER, _FIRST, _SECOND, _THIRD = (f"#0a0b0{number}" for number in range(7))
_COLORS = {
    **{_INK: "ink", _MUTED: "muted", _LINE: "line", _PAPER: "paper"},
    **{_FIRST: "first", _SECOND: "second", _THIRD: "third"},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters, which readers can find, and screen readers read
    "svg.hashsalt": "hfft",
    "font.family": "DejaVu Sans",  # to measure by; one name, as each is looked up at every word
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}
# The first three that there are become curves.
_SCORES = ("accuracy", "balanced_accuracy", "mean_average_precision", "macro_f1", "micro_f1", "subset_accuracy")
_SIZE = (4.3, 2.7)  # inches; small, so that its letters can be read on a phone


@dataclass(frozen=True)
class Chart:
    """A picture and what it shows.

    Attributes:
        title: Above it.
        svg: The picture; safe, as it holds no text but that of a run's own phases and metrics, escaped.
        alt: What it shows, for those who can't see it.
    """

    title: str
    svg: Markup
    alt: str


@dataclass(frozen=True)
class _Point:
    """A place in a chart that says something when pointed at."""

    x: float
    y: float
    words: str


def curve_charts(phases: Sequence[PhaseFacts]) -> list[Chart]:
    """Loss, and scores on the validation images, over the epochs of all phases, one phase after the other."""
    charts = []
    losses = {"loss": ("training", _SECOND), "eval_loss": ("validation", _FIRST)}
    logged = {key for phase in phases for entry in phase.history for key in entry}
    known = [name for name in _SCORES if f"eval_{name}" in logged]
    colors = (_FIRST, _SECOND, _THIRD)
    scores = {f"eval_{name}": (spoken(name), color) for name, color in zip(known, colors, strict=False)}
    for name, title, lines in (("loss", "Loss", losses), ("scores", "Scores on validation images", scores)):
        shown = {key: line for key, line in lines.items() if key in logged}
        if not shown:
            continue
        with _drawing() as (figure, axes):
            points = _draw_phases(axes, phases, shown)
            axes.set(xlabel="epochs, phase after phase")
            axes.legend(loc="best", handlelength=1.4)
            words = ", ".join(label for label, _ in shown.values())
            alt = f"{title}: {words} by epoch, through {', '.join(phase.spec.name for phase in phases)}"
            charts.append(Chart(title, _as_svg(figure, name, points), alt))
    return charts


def reliability_chart(split: SplitFacts, *, is_multi_label: bool = False) -> Chart:
    """Accuracy beside the probability of the predicted class; the dots' areas tell how many images have such a one.

    Args:
        split: A measured split.
        is_multi_label: Whether it is the share of images that have a label, of all labels together.
    """
    what, of, share = ("label", "labels of images", "there") if is_multi_label else ("answer", "images", "right")
    with _drawing() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (3, 3)), linewidth=1)
        axes.plot([b.confidence for b in split.bins], [b.accuracy for b in split.bins], color=_FIRST)
        most = max((part.images for part in split.bins), default=1)
        points = [
            _Point(
                part.confidence,
                part.accuracy,
                f"{part.images:,} {of} with a probability of {part.low:.1f} to {part.high:.1f}: "
                f"{part.confidence:.3f} on average, {part.accuracy:.3f} {share}",
            )
            for part in split.bins
        ]
        _scatter(axes, points, _FIRST, sizes=[10 + 90 * part.images / most for part in split.bins])
        axes.set(xlim=(0, 1.03), ylim=(0, 1.05), xlabel=f"probability of the {what}", ylabel=f"share that is {share}")
        svg = _as_svg(figure, "reliability", points)
    alt = "Reliability: " + "; ".join(f"{b.confidence:.2f} said, {b.accuracy:.2f} {share}" for b in split.bins)
    return Chart("Is a probability what it says?", svg, alt)


def coverage_chart(confidence: Mapping[str, Any]) -> Chart:
    """The share of wrong answers among the most confident ones, as more and more of them are believed."""
    curve = confidence["risk_coverage"]
    with _drawing() as (figure, axes):
        axes.plot(curve["coverage"], curve["risk"], color=_FIRST)
        every = max(len(curve["coverage"]) // 20, 1)
        pairs = list(zip(curve["coverage"], curve["risk"], strict=True))[::-1][::every]
        points = [_Point(x, y, f"the surest {x:.1%} of the images: {y:.1%} wrong") for x, y in pairs]
        _scatter(axes, points, _FIRST, sizes=[9] * len(points))
        axes.set(xlim=(0, 1.02), xlabel="share of images that are answered, the surest first", ylabel="wrong")
        highest = max([*curve["risk"], 0.01])
        axes.set_ylim(bottom=0, top=highest * 1.1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.04 else 1, symbol=" %"))
        svg = _as_svg(figure, "coverage", points)
    half = next(risk for covered, risk in zip(curve["coverage"], curve["risk"], strict=True) if covered >= 0.5)
    alt = f"Risk by coverage: {half:.1%} wrong in the surest half, {curve['risk'][-1]:.1%} in all"
    return Chart("What do you win if it may say: I don't know?", svg, alt)


def retention_chart(by_phase: Mapping[str, Mapping[str, Mapping[str, float | None]]], key: str, title: str) -> Chart:
    """How far each block's features are from the pretrained ones.

    Args:
        by_phase: Phase to block to `cka` and `cosine_drift`.
        key: Which of the two.
        title: Of the chart.
    """
    colors = [_FIRST, _SECOND, _THIRD, _MUTED]
    with _drawing() as (figure, axes):
        points: list[_Point] = []
        names = list(next(iter(by_phase.values())))
        for number, (phase, blocks) in enumerate(by_phase.items()):
            own = [
                _Point(place, value, f"{name} after {phase}: {value:.3f}")
                for place, name in enumerate(names)
                if (value := blocks.get(name, {}).get(key)) is not None
            ]
            axes.plot([p.x for p in own], [p.y for p in own], color=colors[number % 4], label=f"after {phase}")
            _scatter(axes, own, colors[number % 4], sizes=[9] * len(own), number=number)
            points += own
        short = [name.removeprefix("block ").replace("head input", "head") for name in names]
        step = -(-len(names) // 16)
        axes.set_xticks(range(0, len(names), step), short[::step])
        axes.set(xlabel="block")
        axes.set_ylim(bottom=None if key == "cka" else 0)
        axes.legend(loc="best", handlelength=1.4)
        svg = _as_svg(figure, key, points)
    return Chart(title, svg, f"{title}, by block, after {' and after '.join(by_phase)}")


def _draw_phases(axes: Axes, phases: Sequence[PhaseFacts], lines: Mapping[str, tuple[str, str]]) -> list[_Point]:
    points: list[_Point] = []
    start, number = 0.0, 0
    for phase in phases:
        end = start + max((entry["epoch"] for entry in phase.history if "epoch" in entry), default=0.0)
        if start:
            axes.axvline(start, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for key, (label, color) in lines.items():
            entries = [entry for entry in phase.history if key in entry]
            if not entries:
                continue
            places, values = [start + entry["epoch"] for entry in entries], [entry[key] for entry in entries]
            is_new = label not in axes.get_legend_handles_labels()[1]
            axes.plot(places, values, color=color, label=label if is_new else None)
            own = [
                _Point(place, value, _point_words(phase, label, entry, value, is_measured=key.startswith("eval_")))
                for place, value, entry in zip(places, values, entries, strict=True)
            ]
            is_kept = [key.startswith("eval_") and e["step"] == phase.result.best_step for e in entries]
            sizes = [34 if kept else 9 if len(own) < 60 else 4 for kept in is_kept]
            _scatter(axes, own, color, sizes=sizes, number=number)
            points += own
            number += 1
        place: dict[str, Any] = {"ha": "center"} if len(phases) <= 4 else {"ha": "left", "rotation": 40}
        axes.text((start + end) / 2, 1.03, phase.spec.name, transform=axes.get_xaxis_transform(), **place)
        start = end
    axes.set_xlim(0, 1.02 * start or 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=start > 3))
    return points


def _point_words(phase: PhaseFacts, label: str, entry: Mapping[str, float], value: float, *, is_measured: bool) -> str:
    kept = ", kept" if is_measured and entry["step"] == phase.result.best_step else ""
    return f"{phase.spec.name}, epoch {entry['epoch']:.3g}, step {entry['step']:,}{kept}: {label} {value:.4f}"


def _scatter(axes: Axes, points: Sequence[_Point], color: str, *, sizes: Sequence[float], number: int = 0) -> None:
    if points:
        dots = axes.scatter([p.x for p in points], [p.y for p in points], s=list(sizes), color=color, zorder=3)
        dots.set_gid(f"points-{number:03d}")


@contextmanager
def _drawing() -> Iterator[tuple[Figure, Axes]]:
    """A figure with matplotlib's own settings and ours, whatever the user's are."""
    with style.context(["default", _STYLE], after_reset=True), matplotlib.rc_context():
        figure = Figure(figsize=_SIZE)
        yield figure, figure.subplots()


def _as_svg(figure: Figure, name: str, points: Sequence[_Point]) -> Markup:
    """An `svg` element whose names are its own on the page, and whose dots say what they are.

    Args:
        figure: Its dots are in the order of `points`.
        name: Of the chart.
        points: All dots.
    """
    stream = io.StringIO()
    arrange(figure)
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(stream.getvalue())
    for parent in [root, *root.findall(f"{{{_SVG}}}defs")]:
        for tag in ("metadata", "style"):  # for nobody, or for the whole page
            for element in parent.findall(f"{{{_SVG}}}{tag}"):
                parent.remove(element)
    _tell_dots(root, points)
    for element in root.iter():
        _adapt(element, f"{name}-")
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("aria-hidden", "true")  # the figure around it has the words
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, color in _COLORS.items():
        text = text.replace(stand_in, f"var(--{color})")
    return Markup(text)


def _tell_dots(root: ElementTree.Element, points: Sequence[_Point]) -> None:
    groups = [e for e in root.iter(f"{{{_SVG}}}g") if e.get("id", "").startswith("points-")]
    dots = [dot for group in groups for dot in _drawn(group)]
    for dot, point in zip(dots, points, strict=True):
        dot.set("class", "dot")
        dot.set("data-tip", point.words)


def _drawn(group: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """The shapes of a collection: matplotlib draws alike ones by reference, and few or different ones themselves."""
    for element in group:
        if element.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            yield element
        elif element.tag == f"{{{_SVG}}}g":
            yield from _drawn(element)


def _adapt(element: ElementTree.Element, prefix: str) -> None:
    """Own names, and letters in the page's font."""
    if "id" in element.attrib:
        element.set("id", prefix + element.attrib["id"])
    link = element.attrib.pop(f"{{{_LINK}}}href", None)
    if link is not None:
        element.set("href", f"#{prefix}{link[1:]}")
    for key in ("clip-path", "style"):
        if "url(#" in element.get(key, ""):
            element.set(key, element.attrib[key].replace("url(#", f"url(#{prefix}"))
    if element.tag == f"{{{_SVG}}}text":
        parts = [part.strip() for part in element.get("style", "").split(";")]
        kept = [part for part in parts if part and not part.startswith("font")]
        element.set("style", "; ".join(kept))
