"""HTML → title and text, through lexbor's HTML5 parser.

What a reader would not call the page is left out: scripts, navigation, banners. A table of data becomes a line for
each row, its cells apart. An element that is opened and never closed hides nothing but itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from selectolax.lexbor import LexborHTMLParser, LexborNode

from blockrag.errors import InvalidRequestError
from blockrag.ingest.chrome import is_page_furniture
from blockrag.ingest.text_writer import TextWriter

MAX_DEPTH = 2000
"""Elements open at a time. HTML5's rules look through all of them for many a tag, so time grows with depth."""

_HIDDEN = frozenset(
    (
        "head",
        "title",
        "script",
        "style",
        "template",
        "noscript",
        "svg",
        "math",
        "iframe",
        "object",
        "select",
        "textarea",
    )
) | frozenset(("datalist", "button", "dialog", "noframes", "audio", "video", "canvas"))
_SECTIONS = frozenset(
    (
        "address",
        "article",
        "aside",
        "body",
        "center",
        "details",
        "div",
        "fieldset",
        "figure",
        "footer",
        "form",
        "header",
    )
) | frozenset(("hr", "html", "legend", "main", "nav", "section", "summary"))
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "caption", "figcaption"))
_PARAGRAPHS = frozenset(("p", "pre", "blockquote", "ul", "ol", "dl", "table"))
_BLOCKS = _SECTIONS | _HEADINGS | _PARAGRAPHS
_LINES = frozenset(("br", "li", "dt", "dd", "tr", "option"))
_CELLS = frozenset(("td", "th"))
# What stands in a table only where it arranges a page.
_OF_A_LAYOUT = "table, h1, h2, h3, h4, h5, h6, article, section, form, nav"
_LONGEST_CELL = 600

# These swallow what follows until they are closed, or hide it here.
_SWALLOWING = ("title", "textarea", "select", "svg", "math", "noscript", "template", "iframe", "object", "nav",
               "dialog", "button", "header", "footer", "aside", "datalist", "noframes", "audio", "video",
               "canvas")  # fmt: skip
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)(?=[\s/>])[^<>]*>")
_SWALLOWING_TAG = re.compile(rf"<(/?)({'|'.join(_SWALLOWING)})(?=[\s/>])[^<>]*>", re.IGNORECASE)
# Never closed, or closed by what follows them.
_NOT_NESTING = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr", "param")
) | frozenset(("p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "optgroup",
               "colgroup", "a", "button", "nobr", "select", "html", "head", "body"))  # fmt: skip


def read_html(text: str) -> tuple[list[str], str]:
    """Titles to choose from, the best first (``<title>``, ``<h1>``), and the text.

    In the text blocks are apart by an empty line, list items and rows by a newline; spaces are collapsed but in
    ``<pre>``. Raises ``InvalidRequestError`` for a page that is nested too deeply.
    """
    text = _closed(text)
    _check_depth(text)
    tree = LexborHTMLParser(text)
    root = tree.root
    if root is None:
        return [], ""
    page = _Page(root)
    page.walk()
    titles = [" ".join(node.text(deep=True).split()) for node in tree.css("head > title")]
    return [*titles, page.heading], page.writer.text()


def _closed(text: str) -> str:
    """The page without the beginnings of what is never closed."""
    cuts: list[tuple[int, int]] = []
    start = text.find("<!--", max(text.rfind("-->"), 0))
    while start >= 0:
        cuts.append((start, start + 4))
        start = text.find("<!--", start + 4)
    opened: dict[str, list[tuple[int, int]]] = {name: [] for name in _SWALLOWING}
    for match in _SWALLOWING_TAG.finditer(text):
        places = opened[match[2].lower()]
        if not match[1] and not match[0].endswith("/>"):
            places.append(match.span())
        elif match[1] and places:
            places.pop()
    cuts += itertools.chain.from_iterable(opened.values())
    parts: list[str] = []
    place = 0
    for begin, end in sorted(cuts):
        if begin >= place:
            parts.append(text[place:begin])
            place = end
    return "".join([*parts, text[place:]])


def _check_depth(text: str) -> None:
    opened: dict[str, int] = {}
    depth = 0
    for match in _TAG.finditer(text):
        name = match[2].lower()
        if name in _NOT_NESTING:
            continue
        if not match[1]:
            opened[name] = opened.get(name, 0) + 1
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidRequestError(
                    "content", f"the page has more than {MAX_DEPTH} elements within each other, or never closed"
                )
        elif opened.get(name):
            opened[name] -= 1
            depth -= 1


class _Page:
    """A parsed page, read once from its top."""

    def __init__(self, root: LexborNode) -> None:
        self.writer = TextWriter()
        self.heading = ""
        """The first one of the first level."""
        self._root = root
        unseen = sum(_size(node) for node in root.css("script, style, template, noscript"))
        self._chars = _size(root) - unseen

    def walk(self) -> None:
        """Writes the page's text."""
        self._walk([self._root], self.writer)

    def _walk(self, roots: Iterable[LexborNode], writer: TextWriter) -> None:
        # Not recursive: pages may be nested more deeply than Python calls.
        waiting = [(node, False) for node in roots][::-1]
        heading_from = -1
        while waiting:
            node, leaving = waiting.pop()
            tag = node.tag or ""
            if tag == "-text":
                writer.write(node.text_content or "")
                continue
            if leaving:
                if tag == "h1" and heading_from >= 0 and not self.heading:
                    self.heading = writer.line(heading_from)
                writer.verbatim -= tag == "pre"
                _edge(tag, writer)
                continue
            if tag.startswith("-") or tag in _HIDDEN or is_page_furniture(node, self._chars):
                continue
            _edge(tag, writer)
            if tag == "table" and not _is_layout(node):
                self._write_table(node, writer)
                continue
            if tag == "h1":
                heading_from = writer.pieces
            writer.verbatim += tag == "pre"
            waiting.append((node, True))
            waiting.extend((child, False) for child in reversed(list(node.iter(include_text=True))))

    def _write_table(self, table: LexborNode, writer: TextWriter) -> None:
        """A line for each row. Below a row of headings stands Markdown's line of dashes."""
        self._walk(table.css("caption"), writer)
        rows = table.css("tr")
        for number, row in enumerate(rows):
            cells = [cell for cell in row.iter() if cell.tag in _CELLS]
            texts = [self._cell(cell) for cell in cells]
            if not any(texts):
                continue
            writer.edge("\n")
            writer.write_line(" | ".join(texts).strip())
            if number == 0 and len(rows) > 1 and len(cells) > 1 and all(cell.tag == "th" for cell in cells):
                writer.write_line(" | ".join(["---"] * len(cells)))
        writer.edge("\n\n")

    def _cell(self, cell: LexborNode) -> str:
        writer = TextWriter()
        self._walk(cell.iter(include_text=True), writer)
        return writer.line()


def _is_layout(table: LexborNode) -> bool:
    """Whether a table arranges a page instead of holding data."""
    if any(node.mem_id != table.mem_id for node in table.css(_OF_A_LAYOUT)):
        return True
    return any(_size(cell) > _LONGEST_CELL for cell in table.css("td"))


def _edge(tag: str, writer: TextWriter) -> None:
    if tag in _LINES:
        writer.edge("\n")
    elif tag in _BLOCKS or tag in _CELLS:
        writer.edge("\n\n")


def _size(node: LexborNode) -> int:
    return len(node.text(deep=True))
