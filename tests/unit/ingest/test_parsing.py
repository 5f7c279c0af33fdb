"""Files → titles and text."""

from __future__ import annotations

import io

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import MediaType
from blockrag.ingest.plain import unwrap_lines
from blockrag.ingest.splitting import title_from_id
from tests.unit.ingest.reading import parsed


def make_pdf(*pages: str, title: str = "", password: str | None = None, owner_only: bool = False) -> bytes:
    """A pdf with one line of text for each line of a page."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(width=612, height=792)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        lines = "".join(f"({line}) Tj T* " for line in text.split("\n"))
        content.set_data(f"BT /F1 12 Tf 14 TL 72 720 Td {lines}ET".encode() if text else b"")
        page[NameObject("/Contents")] = writer._add_object(content)
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt("" if owner_only else password, owner_password=password, algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("document_id", "title"),
    [
        ("reports/annual_report-2024.txt", "annual report-2024"),
        ("plain", "plain"),
        ("v1.2", "v1.2"),
        ("St. Louis", "St. Louis"),
        ("notes/Vol. 3.md", "Vol. 3"),
        ("notes about cats. And dogs are in here", "notes about cats. And dogs are in here"),
        (".md", ".md"),
    ],
)
def test_titles_from_ids(document_id: str, title: str) -> None:
    assert title_from_id(document_id) == title


def test_plain_text() -> None:
    assert parsed("One.\n\nTwo.", MediaType.TEXT) == ("my file", "One.\n\nTwo.")


def test_lines_that_were_broken_to_fit_a_page_are_joined() -> None:
    text = (
        "It is a truth universally acknowledged, that a single man in\n"
        "possession of a good fortune, must be in want of a wife.\n"
        "\n"
        "Roses are red,\n"
        "violets are blue.\n"
        "A list that comes after a line which is long enough:\n"
        "- first\n"
        "1. second\n"
        "In the year that came before the one they called\n"
        "latest he left.\n"
    )

    assert unwrap_lines(text) == (
        "It is a truth universally acknowledged, that a single man in "
        "possession of a good fortune, must be in want of a wife.\n"
        "\n"
        "Roses are red,\n"
        "violets are blue.\n"
        "A list that comes after a line which is long enough:\n"
        "- first\n"
        "1. second\n"
        "In the year that came before the one they called latest he left.\n"
    )


def test_markdown_takes_the_first_heading_and_keeps_its_marks() -> None:
    title, text = parsed("intro\n\n## The *Title* ##\n\nBody\n", MediaType.MARKDOWN)

    assert title == "The Title"
    assert text == "intro\n\n## The *Title* ##\n\nBody\n"


HTML = """<!doctype html><html><head><title> A &amp; B
</title><style>p { color: red }</style><script>if (a < b) { document.write("<p>no</p>") }</script></head>
<body><nav><a href="/">Home</a></nav><h1>Head<b>ing</b></h1><p>First  para&shy;graph,<br>two lines.</p>
<ul><li>one<li>two</ul><table><tr><th>Name<td>Value</tr><tr><td>x<td>1 &lt; 2</tr></table>
<pre>  kept
   as is</pre><!-- no <p>comment</p> --><p>Last<template>hidden</template> one</p></body></html>"""


def test_html_becomes_paragraphs() -> None:
    title, text = parsed(HTML, MediaType.HTML)

    assert title == "A & B"
    assert text == (
        "Heading\n\nFirst paragraph,\ntwo lines.\n\none\ntwo\n\nName | Value\nx | 1 < 2\n\n  kept\n   as is\n\nLast one"
    )


def test_html_without_a_title_takes_its_heading() -> None:
    assert parsed("<h1>Only <i>this</i></h1><p>x", MediaType.HTML)[0] == "Only this"
    assert parsed("<p>x", MediaType.HTML)[0] == "my file"


def test_pdf() -> None:
    data = make_pdf("Hello pdf.\nA hyphen-\nated word.", "", "Page three.", title="The Title")

    assert parsed(data, MediaType.PDF) == ("The Title", "Hello pdf.\nA hyphenated word.\n\nPage three.\n\n")


def test_a_pdf_that_only_forbids_printing_is_read() -> None:
    data = make_pdf("Open to all.", password="owner", owner_only=True)

    assert PdfReader(io.BytesIO(data)).is_encrypted
    assert parsed(data, MediaType.PDF)[1] == "Open to all.\n\n"


@pytest.mark.parametrize(
    ("data", "media_type", "problem"),
    [
        (make_pdf("secret", password="pass"), MediaType.PDF, "encrypted"),
        (make_pdf("", ""), MediaType.PDF, "OCR"),
        (b"hello, no pdf", MediaType.PDF, "not a pdf"),
        (make_pdf("cut")[:300], MediaType.PDF, "damaged"),
        (b"%PDF-1.4\n" + b"\x00garbage" * 99, MediaType.PDF, "damaged"),
        (b"<html><head><title>only</title></head><script>x</script><body> </body>", MediaType.HTML, "no text"),
        (b"", MediaType.TEXT, "no text"),
        (b" \n ", MediaType.MARKDOWN, "no text"),
        (b"\xff\xfe\x00", MediaType.HTML, "UTF-16"),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, media_type: MediaType, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        parsed(data, media_type)
    assert caught.value.field == "content"
