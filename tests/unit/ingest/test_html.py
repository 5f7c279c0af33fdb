"""Web pages as people save them."""

from __future__ import annotations

import json
import time

import pytest

from blockrag.characters import clean_text
from blockrag.errors import InvalidRequestError
from blockrag.ingest.html import read_html
from blockrag.ingest.splitting import choose_title
from tests.unit.ingest.reading import CASES, DATA

PAGES = json.loads((DATA / "pages" / "expected.json").read_text())


@pytest.mark.parametrize("name", PAGES)
def test_content_is_kept_and_what_surrounds_it_left_out(name: str) -> None:
    """Section D: navigation and cookie banners. The pages that parsers were compared on (docs/decisions.md)."""
    titles, text = read_html((DATA / "pages" / f"{name}.html").read_text())
    text = clean_text(text)

    if name != "broken":  # its title is never closed
        assert choose_title(titles) == PAGES[name]["title"]
    assert [words for words in PAGES[name]["keep"] if words not in text] == []
    assert [words for words in PAGES[name]["drop"] if words in text] == []


@pytest.mark.parametrize(
    "opening",
    ["<title>Page", "<svg>", "<svg><path d='M0 0'>", "<math><mi>x", "<select><option>one", "<textarea>", "<!-- note",
     "<nav>", "<noscript>", "<template>", "<iframe src=x>", "<object>", "<select><select><select></select>"],
)  # fmt: skip
def test_what_is_never_closed_hides_nothing(opening: str) -> None:
    """Section D."""
    for page in (
        f"<p>Before.</p>{opening}<p>After.</p>",
        f"<html><head>{opening}</head><body><div>After.</div></body>",
    ):
        assert "After." in read_html(page)[1]


UNITS = ("<a ", "<!--", "</", "<?", "<div>", "<b><p>", "<i></p>", "<rp>", "<p>", "<svg>", "<table><td>", "<select>",
         "<title>", "<math><mi><p>", '<a href="', "<![CDATA[", "<nav></nav>", "<a><p>", "<li>", "&")  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear_or_the_page_is_refused(unit: str) -> None:
    """Row B1."""
    page = "<p>Start.</p>" + unit * (100_000 // len(unit))
    started = time.process_time()
    try:
        assert "Start." in read_html(page)[1]
    except InvalidRequestError as error:
        assert "within each other" in error.problem
    assert time.process_time() - started < 5  # 0.2 s where nothing else runs; quadratic ways took minutes


def test_the_case_file_is_read() -> None:
    """Row B1."""
    assert read_html((CASES / "broken-tags-32k.html").read_text())[1] == "Start."


def test_tables_of_data_and_tables_that_arrange_a_page() -> None:
    """Row C8."""
    page = "<table><tr><td><h1>Hours</h1><p>One.<p>Two.<table><tr><td>a<br>b<td><ul><li>c<li>d</ul></table></table>"

    assert read_html(page) == (["Hours"], "Hours\n\nOne.\n\nTwo.\n\na b | c d")
