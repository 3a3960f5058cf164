"""The confusion matrix of report.html as shapes: cells that are not empty, where they lie, and how strong they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hfft.runs.facts import SplitFacts

_NUMBERED = 20  # classes up to which cells hold their counts
_NAMED = 100  # classes up to which rows and columns have names
_WIDTH = 1024  # units of the picture at most
_WIDEST = 640  # units that cells with counts take together at most
_LARGEST = 96.0  # units of a cell
_LETTERS, _LINE = 12.0, 0.95  # units of a name's letters at most, and their share of a cell
_ADVANCE = 0.58  # from one letter to the next, in sizes of a letter
_LONGEST = 22  # letters of a name that is shown


@dataclass(frozen=True)
class Cell:
    """Images of a class that were taken for a class.

    Attributes:
        row: Place of their class.
        column: Place of the class they were taken for.
        count: How many.
        strength: Of the colour, from 0 to 1: the share of the class's images; its root where classes are many.
    """

    row: int
    column: int
    count: int
    strength: float


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix.

    Attributes:
        labels: Class names; rows and columns are in their order.
        names: The same, shortened; empty where there are too many.
        images: By class.
        right: By class.
        cells: Those that aren't empty.
        side: Width and height of a cell, in units of the picture.
        margin: Room for names at the left, and at the top where they are turned.
        letters: Size of the names' letters.
        numbered: Whether cells hold their counts.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    images: tuple[int, ...]
    right: tuple[int, ...]
    cells: tuple[Cell, ...]
    side: float
    margin: float
    letters: float
    numbered: bool

    @property
    def size(self) -> float:
        """Width and height of all cells together."""
        return self.side * len(self.labels)

    @property
    def turned(self) -> bool:
        """Whether the names of columns are too long to be level."""
        return max(map(len, self.names), default=0) * _ADVANCE * self.letters > self.side


def lay_out(split: SplitFacts, labels: Sequence[str]) -> Matrix:
    """Place the cells of a measured split.

    Args:
        split: With a confusion.
        labels: Class names, in the order of the model's outputs.
    """
    places = {label: place for place, label in enumerate(labels)}
    totals = [sum(split.confusion.get(label, {}).values()) for label in labels]
    numbered = len(labels) <= _NUMBERED
    cells = [
        Cell(places[label], places[given], count, _strength(count / totals[places[label]], rooted=not numbered))
        for label, row in split.confusion.items()
        for given, count in row.items()
        if count
    ]
    names = tuple(map(_shortened, labels)) if len(labels) <= _NAMED else ()
    advance = _ADVANCE * max(map(len, names), default=0)
    room = _WIDEST if numbered else _WIDTH - 14 - advance * min(_LETTERS, _WIDTH / len(labels))
    side = min(room / len(labels), _LARGEST)
    letters = min(_LETTERS, _LINE * side)
    return Matrix(
        labels=tuple(labels),
        names=names,
        images=tuple(totals),
        right=tuple(split.confusion.get(label, {}).get(label, 0) for label in labels),
        cells=tuple(cells),
        side=round(side, 3),
        margin=round(advance * letters + 14, 1),
        letters=round(letters, 2),
        numbered=numbered,
    )


def _strength(share: float, *, rooted: bool) -> float:
    return round(math.sqrt(share) if rooted else share, 3)


def _shortened(name: str) -> str:
    """Long names often begin alike, so both ends stay."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}…{line[1 - _LONGEST // 2 :]}"
