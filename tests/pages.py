"""An HTML file taken apart: its elements with their attributes, and its text as a reader sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_UNSEEN = ("script", "style", "title")


@dataclass
class Page(HTMLParser):
    """A page that was read with `Page.of(text)`.

    Attributes:
        elements: Tag and attributes of each element, in order.
        words: The visible text, pieces joined by one blank.
        scripts: Type and content of each script.
    """

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: str = ""
    scripts: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._inside: str | None = None

    @classmethod
    def of(cls, text: str) -> Page:
        page = cls()
        page.feed(text)
        page.close()
        page.words = re.sub(r"\s+", " ", page.words)
        return page

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in _UNSEEN:
            self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type") or "", ""))

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            kind, content = self.scripts[-1]
            self.scripts[-1] = (kind, content + data)
        elif self._inside is None:
            self.words += f"{data} "

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of the elements of a tag that have these ones (`class_` for class)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]
