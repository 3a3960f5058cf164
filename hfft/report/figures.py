"""Figures of a run, drawn from its facts: confusion matrices, learning curves, reliability."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hfft.report.arranging import arrange
from hfft.report.fonts import letter
from hfft.runs.facts import PhaseFacts, RunFacts, SplitFacts
from hfft.runs.record import FIGURES
from hfft.system.files import write_folder
from hfft.training.callbacks import HEADLINES

# Okabe and Ito's colours, which colour-blind people can tell apart: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "svg.hashsalt": "hfft",  # the same file at every call
}
_NUMBERED = 20  # classes up to which cells hold their counts
_NAMED = 100  # classes up to which rows and columns have names
_VECTORS = 40  # classes up to which cells are vectors in an SVG


def write_figures(facts: RunFacts) -> tuple[Path, ...]:
    """Draw every figure that the run has numbers for into its `figures/`, as PNG and SVG.

    Args:
        facts: Of the run.

    Returns:
        The files, by name: `confusion_test.png` and the like, `learning_curves`, `reliability_test`.
    """
    figures: dict[str, Figure] = {}
    with _drawing(facts.labels):
        for split in facts.splits.values():
            if split.metrics and not facts.is_multi_label:
                figures[f"confusion_{split.name}"] = draw_confusion(split, facts.labels)
        if facts.judged is not None:
            figures[f"reliability_{facts.judged.name}"] = draw_reliability(
                facts.judged, is_multi_label=facts.is_multi_label
            )
        if any(phase.history for phase in facts.phases):
            figures["learning_curves"] = draw_learning_curves(facts.phases)

        def write(aside: Path) -> None:
            for name, figure in figures.items():
                arrange(figure)
                figure.savefig(aside / f"{name}.png", metadata={"Software": None})
                figure.savefig(aside / f"{name}.svg", metadata={"Date": None, "Creator": None})

        folder = facts.folder / FIGURES
        write_folder(folder, write)
    return tuple(sorted(folder.iterdir()))


def draw_confusion(split: SplitFacts, labels: Sequence[str]) -> Figure:
    """Which class is taken for which: rows are classes, columns predictions, colours shares of a row.

    Args:
        split: A measured split.
        labels: Class names; 20 and fewer have their counts in the cells, more than 100 numbers instead of names.
    """
    size = len(labels)
    counts = _matrix(split.confusion, labels)  # (K, K)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # for the colours alone
    side = float(np.clip(2.2 + 0.42 * size, 4.2, 13))
    figure = Figure(figsize=(side * 1.12, side))
    axes = figure.subplots()
    scale = PowerNorm(1 if size <= _NUMBERED else 0.5, vmin=0, vmax=1)  # small shares of many classes can be seen
    cells = axes.pcolormesh(
        shares, cmap="Blues", norm=scale, edgecolors="white", linewidth=0.8 if size <= _NUMBERED else 0
    )
    cells.set_rasterized(size > _VECTORS)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="predicted class", ylabel="class")
    axes.set_title(f"{split.name}: {split.images:,} images", loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _name_axes(axes, labels, width=side)
    if size <= _NUMBERED:
        fontsize = 9 if counts.max() < 10_000 else 7
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.55 else "#222222" if count else "#999999"
            axes.text(column + 0.5, row + 0.5, f"{count:,}", ha="center", va="center", color=color, fontsize=fontsize)
    bar = figure.colorbar(cells, ax=axes, fraction=0.046, pad=0.02, aspect=20 if size <= 6 else 40, use_gridspec=False)
    bar.set_label("share of the images of a class")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def draw_reliability(split: SplitFacts, *, is_multi_label: bool = False) -> Figure:
    """Accuracy beside the probability of the predicted class, and how many images have such a probability.

    Args:
        split: A measured split.
        is_multi_label: Whether it is the share of images that have a label, of all labels together.
    """
    what = ("probability of a label", "images x labels") if is_multi_label else ("probability of the predicted class",)
    share = "share that has the label" if is_multi_label else "share that is right"
    figure = Figure(figsize=(4.6, 4.9))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1, label="as it should be")
    confidences, accuracies = [part.confidence for part in split.bins], [part.accuracy for part in split.bins]
    upper.plot(confidences, accuracies, color=BLUE, marker="o", label="measured")
    upper.set(ylim=(-0.02, 1.02), ylabel=share)
    upper.set_title(
        f"{split.name}: expected calibration error {split.calibration_error:.3f}"
        if split.calibration_error is not None
        else split.name,
        loc="left",
    )
    upper.legend(frameon=False, loc="upper left")
    lower.bar(
        [part.low for part in split.bins],
        [part.images for part in split.bins],
        width=[part.high - part.low for part in split.bins],
        align="edge",
        color=BLUE,
        edgecolor="white",
    )
    lower.set(xlim=(0, 1), xlabel=what[0], ylabel=what[-1] if is_multi_label else "images")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def draw_learning_curves(phases: Sequence[PhaseFacts]) -> Figure:
    """Loss and scores over the epochs of all phases, one phase after the other; rings mark the weights that were kept.

    Args:
        phases: Of a run, in order.
    """
    figure = Figure(figsize=(7.2, 5.2))
    upper, lower = figure.subplots(2, 1, sharex=True)
    start = 0.0
    for number, phase in enumerate(phases):
        end = start + max((entry["epoch"] for entry in phase.history if "epoch" in entry), default=0.0)
        for axes in (upper, lower) if number else ():
            axes.axvline(start, color=GRAY, linewidth=0.8, linestyle=":")
        _curve(upper, phase, start, ("loss", "training", ORANGE, "-"))
        _curve(upper, phase, start, ("eval_loss", "validation", BLUE, "-"))
        for name in HEADLINES:
            _curve(lower, phase, start, (f"eval_{name}", name.replace("_", " "), BLUE, "-"))
        _curve(lower, phase, start, ("eval_macro_f1", "macro F1", RED, "--"))
        middle = (start + end) / 2
        upper.text(
            middle,
            1.02,
            phase.spec.name,
            ha="center",
            va="bottom",
            transform=upper.get_xaxis_transform(),
            wrap=True,
            rotation=0 if len(phases) <= 6 else 45,
        )
        start = end
    upper.set(ylabel="loss", xlim=(0, 1.02 * start or 1))
    lower.set(ylabel="validation", xlabel="epochs, phase after phase")
    for axes in (upper, lower):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best")
    return figure


def _curve(axes: Axes, phase: PhaseFacts, start: float, line: tuple[str, str, str, str]) -> None:
    """One number of the history as a line; what was kept is ringed where the number is of an evaluation."""
    key, label, color, dashes = line
    entries = [entry for entry in phase.history if key in entry]
    if not entries:
        return
    is_new = label not in axes.get_legend_handles_labels()[1]
    marker = "." if key.startswith("eval_") or len(entries) < 20 else ""
    places, values = [start + entry["epoch"] for entry in entries], [entry[key] for entry in entries]
    axes.plot(places, values, color=color, linestyle=dashes, marker=marker, label=label if is_new else None)
    kept = [entry for entry in entries if key.startswith("eval_") and entry["step"] == phase.result.best_step]
    for entry in kept[:1]:
        axes.plot(start + entry["epoch"], entry[key], color=color, marker="o", markersize=9, fillstyle="none")


def _matrix(confusion: Mapping[str, Mapping[str, int]], labels: Sequence[str]) -> np.ndarray:
    places = {label: place for place, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), int)
    for label, row in confusion.items():
        for given, count in row.items():
            counts[places[label], places[given]] = count
    return counts


def _name_axes(axes: Axes, labels: Sequence[str], width: float) -> None:
    """Names of classes at the rows and columns, or the places of some of them where there are too many."""
    if len(labels) > _NAMED:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(11, integer=True))
        return
    names = letter(labels).names
    size = 9 if len(labels) <= _NUMBERED else max(9 - 0.03 * len(labels), 6)
    centers = [place + 0.5 for place in range(len(labels))]
    room = 0.65 * width / len(labels)  # inches
    turned = max(map(len, names)) * 0.009 * size > room
    axes.set_yticks(centers, names, parse_math=False, fontsize=size)
    axes.set_xticks(centers, names, parse_math=False, fontsize=size, rotation=90 if turned else 0)


@contextmanager
def _drawing(labels: Sequence[str]) -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's are, in fonts that have the labels' characters."""
    ours = {**_STYLE, "font.family": list(letter(labels).families)}
    with style.context(["default", ours], after_reset=True), matplotlib.rc_context():
        yield
