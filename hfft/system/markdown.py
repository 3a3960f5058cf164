"""Any text as Markdown that shows it and does nothing else: escaping, tables, fences."""

import re
from collections.abc import Iterable, Sequence

from hfft.system.text import printable

_SIGNS = re.compile(r"[\\`*\[\]{}#|~$!^]")
_UNDERSCORES = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")  # inside of a word they mean nothing
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escape(text: str) -> str:
    """Text of somebody else's, such as a class name, as one line in a sentence or a table's cell."""
    line = printable(" ".join(text.split()))
    line = _SIGNS.sub(r"\\\g<0>", line)
    line = _UNDERSCORES.sub(lambda found: r"\_" * len(found.group()), line)
    return "".join(_ENTITIES.get(character, character) for character in line)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table of cells that are Markdown already, the first `left` columns aligned to the left."""
    rules = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))


def fence(text: str, language: str) -> str:
    """A block of code, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def folded(summary: str, body: str) -> str:
    """A part that is shown when its summary is clicked."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
