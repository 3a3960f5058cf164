"""Templates -> pages of one file each: style, script and pictures in it, and nothing that it would load."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hfft._version import __version__
from hfft.report.confusion import Matrix
from hfft.report.words import spoken, time_in_words
from hfft.runs.facts import Measured
from hfft.system.text import printable

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, context: dict[str, Any]) -> str:
    """A page; every value of the context is shown as text and never becomes part of the page's code.

    Its Content-Security-Policy lets no script run but the template's own, and nothing be loaded.

    Args:
        template: File in `templates/`.
        context: What it shows.
    """
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = {
        "css": Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": __version__,
    }
    return _environment().get_template(template).render({**page, **context})


def embedded(picture: Path) -> str:
    """A JPEG or PNG as an address that holds it."""
    kind = "png" if picture.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def lowest_tick(values: Sequence[Measured]) -> float:
    """Where a track begins that shows shares with their intervals up to 1: a multiple of 0.1, 0.9 at most."""
    least = min(value.least for value in values)
    return min(math.floor(max(least - 0.02, 0) * 10) / 10, 0.9)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "classes_of": _classes_of,
        "counted": lambda split: f"{split.images:,} {split.name} images",
        "duration": time_in_words,
        "number": _number,
        "percent": _percent,
        "position": _position,
        "short": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
        "signed": lambda value: f"{value:+.3f}",
        "spoken": spoken,
        "whole": lambda count: f"{count:,}",
    }
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float, digits: int = 1, *, bare: bool = False) -> str:
    return f"{100 * value:.{digits}f}" + ("" if bare else " %")


def _position(value: float, low: float, high: float) -> str:
    """Where a value lies on its track, in percent of its length."""
    return f"{min(max(100 * (value - low) / (high - low), 0), 100):.2f}"


def _classes_of(matrix: Matrix) -> Markup:
    """What the script knows of the classes, as JSON that ends no script element."""
    rows = [
        {"name": printable(label), "images": images, "right": right}
        for label, images, right in zip(matrix.labels, matrix.images, matrix.right, strict=True)
    ]
    text = json.dumps(rows, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
