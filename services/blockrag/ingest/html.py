"""HTML → text with paragraphs. Streamed, so that a large page needs little memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

_HIDDEN = frozenset(
    ("script", "style", "template", "noscript", "svg", "math", "iframe", "object", "select", "textarea")
)
_SECTIONS = frozenset(
    (
        "address",
        "article",
        "aside",
        "body",
        "details",
        "dialog",
        "div",
        "fieldset",
        "figure",
        "footer",
        "form",
        "header",
    )
) | frozenset(("hr", "main", "nav", "section", "summary"))
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "caption", "figcaption"))
_PARAGRAPHS = frozenset(("p", "pre", "blockquote", "ul", "ol", "li", "dl", "dt", "dd"))
_TABLES = frozenset(("table", "thead", "tbody", "tfoot", "tr"))
_BLOCKS = _SECTIONS | _HEADINGS | _PARAGRAPHS | _TABLES
_CELLS = frozenset({"td", "th"})
_LIST_ITEMS = frozenset({"li", "tr", "dt", "dd"})
_BREAKS = ("", " ", "\n", "\n\n")
_SPACES = re.compile(r"[ \t\n\r\f]+")
_TITLE_SEARCH_CHARS = 1 << 20


def html_text(pieces: Iterator[str]) -> Iterator[str]:
    """The visible text: blocks are apart by an empty line, list items and rows by a newline, spaces are collapsed."""
    parser = _TextParser()
    for piece in pieces:
        parser.feed(piece)
        if text := parser.take():
            yield text
    parser.close()
    if text := parser.take():
        yield text


def html_title(pieces: Iterator[str]) -> str:
    """The text of ``<title>``, else of the first ``<h1>``, looked for in the first million characters."""
    parser = _TitleParser()
    size = 0
    for piece in pieces:
        parser.feed(piece)
        size += len(piece)
        if parser.title or size > _TITLE_SEARCH_CHARS:
            break
    return parser.title or parser.heading


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._break = ""
        self._hidden: list[str] = []
        self._verbatim = 0
        self._ends_with_space = True
        self._started = False

    def take(self) -> str:
        """The text since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN or tag == "title":
            self._hidden.append(tag)
        elif tag == "pre":
            self._verbatim += 1
        self._handle_edge(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._handle_edge(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif tag == "pre":
            self._verbatim = max(0, self._verbatim - 1)
        self._handle_edge(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._verbatim:
            data = _SPACES.sub(" ", data)
            if self._ends_with_space or self._break:
                data = data.lstrip(" ")
        if not data:
            return
        if self._started and not (self._break == " " and self._ends_with_space):
            self._parts.append(self._break)
        self._break = ""
        self._started = True
        self._parts.append(data)
        self._ends_with_space = data[-1].isspace()

    def _handle_edge(self, tag: str) -> None:
        if tag == "br" or tag in _LIST_ITEMS:
            self._break = max(self._break, "\n", key=_BREAKS.index)
        elif tag in _BLOCKS:
            self._break = "\n\n"
        elif tag in _CELLS:
            self._break = max(self._break, " ", key=_BREAKS.index)


class _TitleParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._inside = ""
        self._texts: dict[str, str] = {"title": "", "h1": ""}
        self.title = ""
        self.heading = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._texts and not self._inside:
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""
            text = " ".join(self._texts[tag].split())
            if tag == "title":
                self.title = self.title or text
            else:
                self.heading = self.heading or text

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._texts[self._inside] += data
