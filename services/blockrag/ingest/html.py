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

MAX_DEPTH = 2000
"""Elements open at a time. HTML5's rules look through all of them for many a tag, so time grows with depth."""


def _tags(names: str) -> frozenset[str]:
    return frozenset(names.split())


_HIDDEN = _tags(
    "head title script style template noscript svg math iframe object select textarea datalist button dialog noframes "
    "audio video canvas"
)
_SECTIONS = _tags(
    "address article aside body center details div fieldset figure footer form header hr html legend main nav section "
    "summary"
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "caption", "figcaption"))
_PARAGRAPHS = frozenset(("p", "pre", "blockquote", "ul", "ol", "dl", "table"))
_BLOCKS = _SECTIONS | _HEADINGS | _PARAGRAPHS
_LINES = frozenset(("br", "li", "dt", "dd", "tr", "option"))
_CELLS = frozenset(("td", "th"))
# What stands in a table only where it arranges a page.
_OF_A_LAYOUT = "table, h1, h2, h3, h4, h5, h6, article, section, form, nav"
_LONGEST_CELL = 600

# These swallow what follows until they are closed, or hide it here.
_SWALLOWING = _tags(
    "title textarea select svg math noscript template iframe object nav dialog button header footer aside datalist "
    "noframes audio video canvas"
)
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)(?=[\s/>])[^<>]*>")
_SWALLOWING_TAG = re.compile(rf"<(/?)({'|'.join(_SWALLOWING)})(?=[\s/>])[^<>]*>", re.IGNORECASE)
# Never closed, or closed by what follows them.
_NOT_NESTING = _tags(
    "area base br col embed hr img input link meta source track wbr param p li dt dd tr td th thead tbody tfoot option "
    "optgroup colgroup a button nobr select html head body"
)
_LARGEST_SHARE = 0.4
# Landmarks and names that are navigation wherever they stand.
_ROLES = frozenset(("navigation", "search", "menu", "menubar", "tablist", "alertdialog"))
_OUTER_ROLES = frozenset(("banner", "contentinfo", "complementary"))
_CONSENT = re.compile(
    r"(?:^|[\W_])cookies?[\W_]*(?:banner|bar|box|consent|dialog|disclaimer|hinweis|info|layer|law|message|modal|notice|"
    r"notification|overlay|policy|popup|preferences|prompt|settings|wall|warning|widget)"
    r"|cookie(?:consent|bot|yes|law)|onetrust|usercentrics|didomi|gdpr|ccpa|consent[\W_]*(?:banner|manager|modal|"
    r"popup|sdk|overlay|bar|box)|qc-cmp|truste|cc-(?:window|banner)",
    re.IGNORECASE,
)
_LINKS = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|menu|mainmenu|submenu|breadcrumbs?|pagination|pager|sidebar|toc|related|"
    r"tagcloud|topbar|toolbar|sitemap|skip)(?:$|[\s_-])",
    re.IGNORECASE,
)
_ASIDES = re.compile(
    r"(?:^|[\s_-])(?:share|sharing|social|newsletter|subscribe|signup|advert|advertisement|sponsored|promo)(?:$|[\s_-])",
    re.IGNORECASE,
)
_FOOTERS = re.compile(r"(?:^|\s)(?:site-?|page-?|global-?)?footer(?:$|\s)", re.IGNORECASE)
_MARKS = re.compile(
    r"(?:^|\s)(?:headerlink|anchor-?link|mw-editsection|skip-link|skip-to-content|sr-only-focusable)(?:$|\s)"
)
_FURNITURE_TAGS = frozenset(("nav", "footer", "aside"))
_ASIDE_CHARS = 400
_CONTENT = ("main", "article")
_BREAKS = ("", "\n", "\n\n")
_SPACES = re.compile(r"[ \t\n\r\f\xa0]+")


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


class TextWriter:
    """Text as it grows from a page: spaces collapsed, blocks apart."""

    def __init__(self) -> None:
        self.verbatim = 0
        """Above 0: spaces and newlines are text."""
        self._parts: list[str] = []
        self._break = ""
        self._ends_with_space = True

    def write(self, text: str) -> None:
        """Text within a block."""
        if not self.verbatim:
            text = _SPACES.sub(" ", text)
            if self._ends_with_space or self._break:
                text = text.lstrip(" ")
        if text:
            self._append(text)

    def write_line(self, line: str) -> None:
        """A line as it is."""
        self._append(line)
        self.edge("\n")

    def edge(self, kind: str) -> None:
        """What comes next is apart by a newline or by an empty line."""
        self._break = max(self._break, kind, key=_BREAKS.index)

    @property
    def pieces(self) -> int:
        """How many were written: a place for ``line``."""
        return len(self._parts)

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts).rstrip()

    def line(self, start: int = 0) -> str:
        """What was written since ``start``, on one line."""
        return " ".join("".join(self._parts[start:]).split())

    def _append(self, text: str) -> None:
        if self._parts:
            if self._break:
                self._parts[-1] = self._parts[-1].rstrip()
            self._parts.append(self._break)
        self._break = ""
        self._parts.append(text)
        self._ends_with_space = text[-1].isspace()


class _Page:
    """A parsed page, read once from its top."""

    def __init__(self, root: LexborNode) -> None:
        self.writer = TextWriter()
        self.heading = ""
        """The first one of the first level."""
        unseen = sum(_size(node) for node in root.css("script, style, template, noscript"))
        self._chars = _size(root) - unseen
        self._walk([root], self.writer)

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
            if tag.startswith("-") or tag in _HIDDEN or _is_page_furniture(node, self._chars):
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


def _is_page_furniture(node: LexborNode, page_chars: int) -> bool:
    """Whether an element holds none of what the page is about.

    What holds the page's main part, its heading, or much of all its text (``page_chars``) never is.
    """
    tag = node.tag or ""
    attributes = node.attributes
    if not attributes and tag not in _FURNITURE_TAGS:
        return False
    role = (attributes.get("role") or "").lower()
    names = f"{attributes.get('class') or ''} {attributes.get('id') or ''}"
    if not _is_candidate(node, tag, role, names, attributes):
        return False
    if node.css_first("main, article, h1, [role=main]") is not None:
        return False
    return len(node.text(deep=True, separator="", strip=False)) <= max(_LARGEST_SHARE * page_chars, _ASIDE_CHARS)


def _is_candidate(node: LexborNode, tag: str, role: str, names: str, attributes: dict[str, str | None]) -> bool:
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    if tag == "nav" or role in _ROLES:
        return True
    named = bool(names.strip())
    if named and (_CONSENT.search(names) or _MARKS.search(names)):
        return True
    if tag in ("footer", "aside") or role in _OUTER_ROLES or (named and _FOOTERS.search(names)):
        return not _is_within_content(node)
    if named and _LINKS.search(names):
        return _is_links(node)
    return bool(named and _ASIDES.search(names)) and len(node.text(deep=True)) <= _ASIDE_CHARS


def _is_within_content(node: LexborNode) -> bool:
    parent = node.parent
    while parent is not None:
        if parent.tag in _CONTENT or parent.tag == "blockquote" or (parent.attributes or {}).get("role") == "main":
            return True
        parent = parent.parent
    return False


def _is_links(node: LexborNode) -> bool:
    """More than half of its text, headings aside, is in links."""
    if node.tag == "a":
        return True
    linked = sum(len(link.text(deep=True).strip()) for link in node.css("a"))
    headings = sum(len(heading.text(deep=True).strip()) for heading in node.css("h2, h3, h4, h5, h6"))
    return 2 * linked > len("".join(node.text(deep=True).split())) - headings
