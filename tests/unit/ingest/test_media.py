"""Media types, decoding, binaries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.characters import clean_text
from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import MediaType, decode, media_type_of


@pytest.mark.parametrize(
    ("declared", "document_id", "expected"),
    [
        ("text/plain", "x", MediaType.TEXT),
        ("Text/Markdown; charset=UTF-8", "x.html", MediaType.MARKDOWN),
        ("application/x-ndjson", "x", MediaType.JSONL),
        ("", "notes/a.TXT", MediaType.TEXT),
        ("", "a.b.md", MediaType.MARKDOWN),
        (" ", "page.htm", MediaType.HTML),
        ("", "paper.pdf", MediaType.PDF),
        ("", "rows.ndjson", MediaType.JSONL),
    ],
)
def test_media_types(declared: str, document_id: str, expected: MediaType) -> None:
    assert media_type_of(declared, document_id) is expected


@pytest.mark.parametrize(
    ("declared", "document_id"),
    [
        ("", "no-suffix"),
        ("", "a.docx"),
        ("image/png", "a.txt"),
        ("nonsense", "a.txt"),
        ("text/plain; charset=latin-1", "a"),
    ],
)
def test_unknown_media_types(declared: str, document_id: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        media_type_of(declared, document_id)
    assert caught.value.field == "media_type"


def test_text_is_decoded_and_cleaned() -> None:
    assert decode(b"\xef\xbb\xbfA\r\nB\rC\n\x00\x07D\tE\x0cF\xc2\x85G\x7f") == "A\nB\nC\nD\tE\n\nF\nG"


@given(st.text())
def test_any_text_survives_but_for_controls(text: str) -> None:
    data = ("x" + text).encode("utf-8", "ignore")

    assert decode(data) == clean_text(data.decode())


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"abc\xff", 3),
        ("ä".encode("latin-1") + b"bc", 0),
        (b"x" * 99_999 + b"\xc3(", 99_999),
        (b"ends with half \xe2\x82", 15),
        (b"\xed\xa0\x80 surrogate", 0),
    ],
)
def test_what_is_not_utf8_is_located(data: bytes, offset: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"byte {offset} ") as caught:
        decode(data)
    assert caught.value.field == "content"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"PK\x03\x04rest", "zip"),
        (b"\x7fELF\x02", "program"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"%PDF-1.7\n...", "application/pdf"),
        (b"GIF89a\x01\x00\x00", "GIF"),
        ("\u200b\u200d \u2060\n".encode(), "no text"),
        (b"ab\x00\x01\x02\x03\x04\x05\x06cd" * 50, "binary"),
        (b"", "no text"),
        (b" \n\t\x00 ", "no text"),
        ("\ufeff".encode(), "no text"),
    ],
)
def test_what_is_no_text(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        decode(data)
    assert caught.value.field == "content"


def test_a_few_control_characters_are_no_reason_to_refuse() -> None:
    text = decode(b"a log with \x1b[1mcolours\x1b[0m and one \x00 nul " * 3)
    assert "colours" in text
