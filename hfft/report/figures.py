"""Figures of a run: each drawn once by matplotlib, for a file in `figures/` and for report.html.

Files have Okabe and Ito's colours on white, which colour-blind people can tell apart
(https://jfly.uni-koeln.de/color/); the page's figures take colours and font from the page around them.
"""

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hfft.report.confusion import draw_confusion, letter
from hfft.report.words import spoken
from hfft.runs.facts import PhaseFacts, RunFacts, SplitFacts
from hfft.runs.record import FIGURES, FIRST_BATCH
from hfft.system.files import write_file, write_folder
from hfft.training.range_test import RangeTest

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# What the page calls its colours, to those of the files.
_COLORS = {
    **{"ink": "#1a1a1a", "muted": "#666666", "line": "#d0d0d0"},
    **{"first": "#0072b2", "second": "#e69f00", "third": "#d55e00"},
}
_INK, _MUTED, _LINE, _FIRST, _SECOND, _THIRD = _COLORS.values()
_STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"
# The first three that there are become curves.
_SCORES = ("accuracy", "balanced_accuracy", "mean_average_precision", "macro_f1", "micro_f1", "subset_accuracy")
_WIDTH = 4.3  # inches; small, so that letters can be read on a phone


@dataclass(frozen=True)
class Point:
    """A dot of a chart, and what it says when pointed at."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Chart:
    """A figure and what it shows."""

    name: str  # of its file; of all charts of a page each has its own
    title: str  # above it on the page
    alt: str  # what it shows, for those who can't see it
    figure: Figure
    points: tuple[Point, ...]  # its dots, in the order in which they were drawn

    @property
    def svg(self) -> Markup:
        """An `svg` element for the page, whose dots say what they are; safe, as all text in it is escaped."""
        stream = io.StringIO()
        with _styled({"svg.fonttype": "none"}):  # letters stay letters, for readers and search
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            self.figure.savefig(stream, format="svg", metadata=metadata, facecolor="none")
        return _for_page(stream.getvalue(), f"{self.name}-", self.points)


def write_figures(facts: RunFacts) -> tuple[Path, ...]:
    """Write every figure that the run has numbers for into its `figures/`, as PNG and SVG; the files by name."""
    charts = [learning_curves(facts.phases)]
    if facts.judged is not None:
        charts.append(reliability(facts.judged, is_multi_label=facts.is_multi_label))
    figures = {chart.name: chart.figure for chart in charts if chart is not None}
    for split in facts.splits.values():
        if split.metrics and not facts.is_multi_label:
            with _styled({"axes.grid": False, "font.family": list(letter(facts.labels)[0]), "font.size": 9}):
                figures[f"confusion_{split.name}"] = _arranged(draw_confusion(split, facts.labels))

    def write(aside: Path) -> None:
        with _styled({"savefig.facecolor": "white"}):
            for name, figure in figures.items():
                figure.savefig(aside / f"{name}.png", metadata={"Software": None})
                figure.savefig(aside / f"{name}.svg", metadata={"Date": None, "Creator": None})
        with suppress(FileNotFoundError):
            shutil.copyfile(facts.folder / FIGURES / FIRST_BATCH, aside / FIRST_BATCH)

    write_folder(facts.folder / FIGURES, write)
    return tuple(sorted((facts.folder / FIGURES).iterdir()))


def write_range_curve(found: RangeTest, file: Path) -> None:
    """Draw the losses of a learning-rate range test; the kind of file is that of its name."""
    with _drawing(2.7) as (figure, (axes,)):
        axes.plot(found.learning_rates, found.losses, color=_LINE, label="batches")
        axes.plot(found.learning_rates, found.smoothed, color=_FIRST, label="mean of neighbours")
        if found.suggestion is not None:
            axes.axvline(found.suggestion, color=_THIRD, linestyle="--", label=f"suggested: {found.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(0, 2 * max(found.smoothed[:10])))
        axes.legend(loc="best")
    with _styled({"savefig.facecolor": "white"}):
        write_file(file, lambda aside: figure.savefig(aside, format=file.suffix.lstrip(".")))


def learning_curves(phases: Sequence[PhaseFacts]) -> Chart | None:
    """Loss, and scores on the validation images, over the epochs of all phases, one phase after the other.

    Large dots mark the weights that a phase ended with. None where nothing was logged.
    """
    logged = {key for phase in phases for entry in phase.history for key in entry}
    scores = [name for name in _SCORES if f"eval_{name}" in logged]
    colors = (_FIRST, _SECOND, _THIRD)
    panels = {
        "loss": {"loss": ("training", _SECOND), "eval_loss": ("validation", _FIRST)},
        "scores": {f"eval_{name}": (spoken(name), color) for name, color in zip(scores, colors, strict=False)},
    }
    shown = {title: {key: line for key, line in lines.items() if key in logged} for title, lines in panels.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    if not shown:
        return None
    with _drawing(0.5 + 2.2 * len(shown), rows=len(shown)) as (figure, all_axes):
        points: list[Point] = []
        for axes, (title, lines) in zip(all_axes, shown.items(), strict=True):
            points += _draw_phases(axes, phases, lines, first=len(points), named=axes is all_axes[0])
            axes.set(ylabel=title)
            axes.legend(loc="best")
        all_axes[-1].set(xlabel="epochs, phase after phase")
    words = "; ".join(f"{title}: {', '.join(label for label, _ in lines.values())}" for title, lines in shown.items())
    alt = f"{words[0].upper()}{words[1:]}, by epoch, through {', '.join(phase.spec.name for phase in phases)}"
    return Chart("learning_curves", "Loss, and scores on validation images", alt, figure, tuple(points))


def reliability(split: SplitFacts, *, is_multi_label: bool = False) -> Chart:
    """Accuracy against the probability of the predicted class, or multi-label of all labels together."""
    what, of, share = ("label", "labels of images", "there") if is_multi_label else ("answer", "images", "right")
    bins = split.bins
    points = tuple(
        Point(
            part.confidence,
            part.accuracy,
            f"{part.images:,} {of} with a probability of {part.low:.1f} to {part.high:.1f}: "
            f"{part.confidence:.3f} on average, {part.accuracy:.3f} {share}",
        )
        for part in bins
    )
    with _drawing(3.9, rows=2, height_ratios=[3, 1]) as (figure, (upper, lower)):
        upper.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (3, 3)), linewidth=1)
        upper.plot([part.confidence for part in bins], [part.accuracy for part in bins], color=_FIRST)
        _scatter(upper, points, _FIRST, sizes=[16] * len(points))
        upper.set(xlim=(0, 1.03), ylim=(0, 1.05), ylabel=f"share that is {share}")
        if split.calibration_error is not None:
            upper.set_title(f"{split.name}: expected calibration error {split.calibration_error:.3f}", loc="left")
        centers = [(part.low + part.high) / 2 for part in bins]
        widths = [0.9 * (part.high - part.low) for part in bins]
        lower.bar(centers, [part.images for part in bins], width=widths, color=_FIRST)
        lower.set(xlabel=f"probability of the {what}", ylabel=of.replace(" of ", "\nof "))
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    alt = "Reliability: " + "; ".join(f"{b.confidence:.2f} said, {b.accuracy:.2f} {share}" for b in bins)
    return Chart(f"reliability_{split.name}", "Is a probability what it says?", alt, figure, points)


def risk_by_coverage(confidence: Mapping[str, Any]) -> Chart:
    """The share of wrong answers among the most confident ones, as more and more of them are given."""
    coverage, risk = confidence["risk_coverage"]["coverage"], confidence["risk_coverage"]["risk"]
    every = max(len(coverage) // 20, 1)
    pairs = list(zip(coverage, risk, strict=True))
    points = tuple(Point(x, y, f"the surest {x:.1%} of the images: {y:.1%} wrong") for x, y in pairs[::-1][::every])
    with _drawing(2.7) as (figure, (axes,)):
        axes.plot(coverage, risk, color=_FIRST)
        _scatter(axes, points, _FIRST, sizes=[9] * len(points))
        highest = max([*risk, 0.01])
        axes.set(xlim=(0, 1.02), xlabel="share of images that are answered, the surest first", ylabel="wrong")
        axes.set_ylim(bottom=0, top=highest * 1.1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.04 else 1, symbol=" %"))
    half = next(y for x, y in pairs if x >= 0.5)
    alt = f"Risk by coverage: {half:.1%} wrong in the surest half, {risk[-1]:.1%} in all"
    return Chart("coverage", "What do you win if it may say: I don't know?", alt, figure, points)


def retention_by_block(blocks: Mapping[str, Mapping[str, Mapping[str, float | None]]], key: str, title: str) -> Chart:
    """How far each block's features are from the pretrained ones; `key` is `cka` or `cosine_drift`."""
    colors = [_FIRST, _SECOND, _THIRD, _MUTED]
    names = list(next(iter(blocks.values())))
    points: list[Point] = []
    with _drawing(2.7) as (figure, (axes,)):
        for number, (phase, values) in enumerate(blocks.items()):
            own = [
                Point(place, value, f"{name} after {phase}: {value:.3f}")
                for place, name in enumerate(names)
                if (value := values.get(name, {}).get(key)) is not None
            ]
            color = colors[number % len(colors)]
            axes.plot([p.x for p in own], [p.y for p in own], color=color, label=f"after {phase}")
            _scatter(axes, own, color, sizes=[9] * len(own), first=len(points))
            points += own
        short = [name.removeprefix("block ").replace("head input", "head") for name in names]
        step = -(-len(names) // 16)
        axes.set_xticks(range(0, len(names), step), short[::step])
        axes.set(xlabel="block")
        axes.set_ylim(bottom=None if key == "cka" else 0)
        axes.legend(loc="best")
    return Chart(key, title, f"{title}, by block, after {' and after '.join(blocks)}", figure, tuple(points))


def _draw_phases(
    axes: Axes, phases: Sequence[PhaseFacts], lines: Mapping[str, tuple[str, str]], *, first: int, named: bool
) -> list[Point]:
    points: list[Point] = []
    start = 0.0
    for phase in phases:
        end = start + max((entry["epoch"] for entry in phase.history if "epoch" in entry), default=0.0)
        if start:
            axes.axvline(start, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for key, (label, color) in lines.items():
            entries = [entry for entry in phase.history if key in entry]
            if not entries:
                continue
            kept = [key.startswith("eval_") and entry["step"] == phase.result.best_step for entry in entries]
            own = []
            for entry, is_kept in zip(entries, kept, strict=True):
                when = f"{phase.spec.name}, epoch {entry['epoch']:.3g}, step {entry['step']:,}"
                words = f"{when}{', kept' if is_kept else ''}: {label} {entry[key]:.4f}"
                own.append(Point(start + entry["epoch"], entry[key], words))
            is_new = label not in axes.get_legend_handles_labels()[1]
            axes.plot([p.x for p in own], [p.y for p in own], color=color, label=label if is_new else None)
            sizes = [34 if is_kept else 9 if len(own) < 60 else 4 for is_kept in kept]
            _scatter(axes, own, color, sizes=sizes, first=first + len(points))
            points += own
        if named:
            where: dict[str, Any] = {"ha": "center"} if len(phases) <= 4 else {"ha": "left", "rotation": 40}
            axes.text((start + end) / 2, 1.03, phase.spec.name, transform=axes.get_xaxis_transform(), **where)
        start = end
    axes.set_xlim(0, 1.02 * start or 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=start > 3))
    return points


def _scatter(axes: Axes, points: Sequence[Point], color: str, *, sizes: Sequence[float], first: int = 0) -> None:
    """Dots, of which `first` is the number of the first one."""
    if points:
        dots = axes.scatter([p.x for p in points], [p.y for p in points], s=list(sizes), color=color, zorder=3)
        dots.set_gid(f"points-{first:06d}")


@contextmanager
def _styled(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Matplotlib's own settings and ours, whatever the user's are."""
    with style.context(["default", _STYLE, dict(more or {})], after_reset=True), matplotlib.rc_context():
        yield


@contextmanager
def _drawing(height: float, *, rows: int = 1, **options: Any) -> Iterator[tuple[Figure, tuple[Axes, ...]]]:
    """A figure of axes one above the other, which is arranged at the end; `height` is in inches."""
    with _styled():
        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, **options)
        yield figure, tuple(np.ravel(axes))
        _arranged(figure)


def _arranged(figure: Figure) -> Figure:
    """The figure, whose axes leave room for their words.

    With a layout engine of its own, a figure is drawn twice for each file, first to find this room. It is found twice:
    axes of another size have other ticks, and those of a fixed aspect ratio another shape.
    """
    for _ in range(2):
        ConstrainedLayoutEngine().execute(figure)
    return figure


def _for_page(text: str, prefix: str, points: Sequence[Point]) -> Markup:
    """An SVG file as an element of a page, with names that begin with a prefix, and words for its dots."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(text)
    for parent in [root, *root.findall(f"{{{_SVG}}}defs")]:
        for tag in ("metadata", "style"):  # for nobody, or for the whole page
            for element in parent.findall(f"{{{_SVG}}}{tag}"):
                parent.remove(element)
    groups = [e for e in root.iter(f"{{{_SVG}}}g") if e.get("id", "").startswith("points-")]
    groups.sort(key=lambda group: group.get("id", ""))
    dots = [dot for group in groups for dot in _shapes(group)]
    for dot, point in zip(dots, points, strict=True):
        dot.set("class", "dot")
        dot.set("data-tip", point.words)
    for element in root.iter():
        _adapt(element, prefix)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("aria-hidden", "true")  # the figure around it has the words
    text = ElementTree.tostring(root, encoding="unicode")
    for name, color in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return Markup(text)


def _shapes(group: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """The shapes of a collection: matplotlib draws alike ones by reference, and few or different ones themselves."""
    for element in group:
        if element.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            yield element
        elif element.tag == f"{{{_SVG}}}g":
            yield from _shapes(element)


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
