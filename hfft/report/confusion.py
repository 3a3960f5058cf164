"""The confusion matrix: its cells as the page lays them out, its drawing for a file, and fonts for class names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hfft.runs.facts import SplitFacts

_NUMBERED = 20  # classes up to which cells hold their counts
_NAMED = 100  # classes up to which rows and columns have names
_VECTORS = 40  # classes up to which cells are vectors in an SVG file
_WIDTH = 1024  # units of the picture at most
_WIDEST = 640  # units that cells with counts take together at most
_LARGEST = 96.0  # units of a cell
_LETTERS, _LINE = 12.0, 0.95  # units of a name's letters at most, and their share of a cell
_ADVANCE = 0.58  # from one letter to the next, in sizes of a letter
_FONT = "DejaVu Sans"  # comes with matplotlib
_NO_LETTERS = ("Last Resort", "DejaVu Sans Display", "STIXNon", "STIXSize")  # boxes and single signs
_LONGEST = 22  # characters


@dataclass(frozen=True)
class Cell:
    """Images of a class (row) that were taken for a class (column)."""

    row: int
    column: int
    count: int
    strength: float  # of the colour: share of the class's images; its root where classes are many


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix on the page; sizes are in units of the picture."""

    labels: tuple[str, ...]  # of rows and columns, in their order
    names: tuple[str, ...]  # the same, shortened; empty where there are too many
    images: tuple[int, ...]  # by class
    right: tuple[int, ...]  # by class
    cells: tuple[Cell, ...]  # those that aren't empty
    side: float  # of a cell
    margin: float  # room for names at the left, and at the top where they are turned
    letters: float  # size of the names' letters
    numbered: bool  # whether cells hold their counts

    @property
    def size(self) -> float:
        """Width and height of all cells together."""
        return self.side * len(self.labels)

    @property
    def turned(self) -> bool:
        """Whether the names of columns are too long to be level."""
        return max(map(len, self.names), default=0) * _ADVANCE * self.letters > self.side


def lay_out(split: SplitFacts, labels: Sequence[str]) -> Matrix:
    """Place the cells of a measured split for the page; `labels` are in the order of the model's outputs."""
    counts, numbered = count_matrix(split, labels), len(labels) <= _NUMBERED
    totals = counts.sum(axis=1)
    cells = []
    for row, column in np.argwhere(counts).tolist():
        share = float(counts[row, column] / totals[row])
        cells.append(Cell(row, column, int(counts[row, column]), round(share if numbered else math.sqrt(share), 3)))
    names = tuple(map(shortened, labels)) if len(labels) <= _NAMED else ()
    advance = _ADVANCE * max(map(len, names), default=0)
    room = _WIDEST if numbered else _WIDTH - 14 - advance * min(_LETTERS, _WIDTH / len(labels))
    side = min(room / len(labels), _LARGEST)
    letters = min(_LETTERS, _LINE * side)
    return Matrix(
        labels=tuple(labels),
        names=names,
        images=tuple(totals.tolist()),
        right=tuple(counts.diagonal().tolist()),
        cells=tuple(cells),
        side=round(side, 3),
        margin=round(advance * letters + 14, 1),
        letters=round(letters, 2),
        numbered=numbered,
    )


def count_matrix(split: SplitFacts, labels: Sequence[str]) -> np.ndarray:
    """Images by class (row) and predicted class (column), (K, K)."""
    numbers = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), int)
    for label, row in split.confusion.items():
        for given, count in row.items():
            counts[numbers[label], numbers[given]] = count
    return counts


def draw_confusion(split: SplitFacts, labels: Sequence[str]) -> Figure:
    """Draw which class is taken for which: rows are classes, columns predictions, colours shares of a row.

    Up to 20 classes have their counts in the cells; more than 100 have numbers instead of names.
    """
    size, counts = len(labels), count_matrix(split, labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K)
    side = float(np.clip(2.2 + 0.42 * size, 4.2, 13))
    figure = Figure(figsize=(side * 1.12, side))
    axes = figure.subplots()
    few: Any = {"edgecolors": "white", "linewidth": 0.8 if size <= _NUMBERED else 0}
    norm = PowerNorm(1 if size <= _NUMBERED else 0.5, vmin=0, vmax=1)
    cells = axes.pcolormesh(shares, cmap="Blues", norm=norm, **few)
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


def _name_axes(axes: Axes, labels: Sequence[str], width: float) -> None:
    """Names of classes at the rows and columns, or the numbers of some of them where there are too many."""
    if len(labels) > _NAMED:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(11, integer=True))
        return
    _, names = letter(labels)
    size = 9 if len(labels) <= _NUMBERED else max(9 - 0.03 * len(labels), 6)
    centers = [number + 0.5 for number in range(len(labels))]
    room = 0.65 * width / len(labels)  # inches
    turned = max(map(len, names)) * 0.009 * size > room
    axes.set_yticks(centers, names, parse_math=False, fontsize=size)
    axes.set_xticks(centers, names, parse_math=False, fontsize=size, rotation=90 if turned else 0)


def letter(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fonts for matplotlib's `font.family`, and names as they can draw them, in one line and shortened.

    The first font that has a character draws it. `#3` is the name at place 3 (from 0), of which no font here has all
    characters.
    """
    lines = [" ".join(name.split()) for name in names]
    wanted = {ord(character) for line in lines for character in line}
    families, lacking = [_FONT], wanted - _characters(_FONT)
    for family in sorted(_files()) if lacking else ():
        if found := lacking & _characters(family):
            families.append(family)
            lacking -= found
        if not lacking:
            break
    shown = [
        shortened(line) if line and not lacking & set(map(ord, line)) else f"#{place}"
        for place, line in enumerate(lines)
    ]
    return tuple(families), tuple(shown)


def shortened(name: str) -> str:
    """A name in one line of 22 characters at most; long names often begin alike, so both ends stay."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}…{line[1 - _LONGEST // 2 :]}"


@cache
def _files() -> dict[str, str]:
    """Families of upright fonts of usual weight on this machine, and their files."""
    entries = font_manager.fontManager.ttflist
    usual = [entry for entry in entries if entry.style == "normal" and entry.weight in (400, "normal", "regular")]
    usual = [entry for entry in usual if not entry.name.startswith(_NO_LETTERS)]
    return {entry.name: entry.fname for entry in sorted(usual, key=lambda entry: entry.fname, reverse=True)}


@cache
def _characters(family: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(_files()[family]).get_charmap())
    except (OSError, RuntimeError):  # removed since the fonts were listed, or of a kind that can't be read
        return frozenset()
