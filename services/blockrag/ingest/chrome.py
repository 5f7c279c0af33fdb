"""What surrounds a web page's content: navigation, banners, footers, what is hidden."""

from __future__ import annotations

import re

from selectolax.lexbor import LexborNode

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
_TAGS = frozenset(("nav", "footer", "aside"))
_ASIDE_CHARS = 400
_CONTENT = ("main", "article")


def is_page_furniture(node: LexborNode, page_chars: int) -> bool:
    """Whether an element holds none of what the page is about.

    What holds the page's main part, its heading, or much of all its text (``page_chars``) never is.
    """
    tag = node.tag or ""
    attributes = node.attributes
    if not attributes and tag not in _TAGS:
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
