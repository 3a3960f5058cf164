"""Class names as figures can show them: short, and in fonts that have their characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from matplotlib import font_manager

_FIRST = "DejaVu Sans"  # comes with matplotlib
_NO_LETTERS = ("Last Resort", "DejaVu Sans Display", "STIXNon", "STIXSize")  # boxes and single signs
_LONGEST = 22  # characters


@dataclass(frozen=True)
class Lettering:
    """Names to draw and the fonts to draw them with.

    Attributes:
        families: For matplotlib's `font.family`, the first that has a character draws it.
        names: Those that were asked for, in one line and shortened; `#3` is the one at place 3 (from 0), where no
            font here has its characters.
    """

    families: tuple[str, ...]
    names: tuple[str, ...]


def letter(names: Sequence[str]) -> Lettering:
    """Choose fonts for names.

    Args:
        names: In their order, which is what `#3` refers to.
    """
    lines = [" ".join(name.split()) for name in names]
    wanted = {ord(character) for line in lines for character in line}
    families, lacking = [_FIRST], wanted - _characters(_FIRST)
    for family in _families() if lacking else ():
        if found := lacking & _characters(family):
            families.append(family)
            lacking -= found
        if not lacking:
            break
    shown = [
        shortened(line) if line and not lacking & set(map(ord, line)) else f"#{place}"
        for place, line in enumerate(lines)
    ]
    return Lettering(tuple(families), tuple(shown))


def shortened(name: str) -> str:
    """A name in one line of 22 characters at most; long names often begin alike, so both ends stay."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}…{line[1 - _LONGEST // 2 :]}"


@cache
def _families() -> tuple[str, ...]:
    """Upright fonts of usual weight on this machine that hold letters, by name."""
    return tuple(sorted(name for name in _files() if not name.startswith(_NO_LETTERS)))


@cache
def _files() -> dict[str, str]:
    """Font family to file."""
    entries = font_manager.fontManager.ttflist
    usual = [entry for entry in entries if entry.style == "normal" and entry.weight in (400, "normal", "regular")]
    return {entry.name: entry.fname for entry in sorted(usual, key=lambda entry: entry.fname, reverse=True)}


@cache
def _characters(family: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(_files()[family]).get_charmap())
    except (OSError, RuntimeError):  # removed since the fonts were listed, or of a kind that can't be read
        return frozenset()
