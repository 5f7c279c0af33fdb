"""One document's file → its title and its text, in pieces."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from blockrag.ingest.html import html_text, html_title
from blockrag.ingest.media import MediaType, check_text, no_text, read_text
from blockrag.ingest.pdf import open_pdf

PARSER_VERSION = 1
"""Raise it when the same bytes would give other text: part of a document's version."""

_HEADING = re.compile(r"^#{1,6}[ \t]+(\S.*?)[ \t]*#*$", re.MULTILINE)
_TITLE_CHARS = 300
# A line that was broken to fit a page: neither short (verse, headings) nor longer than any page, and what follows
# is no list item, quotation or table.
_WRAPPED = re.compile(r"^([^\n]{30,110})\n(?=[^\s\-*•#>|+])(?!\d{1,3}[.)]\s)", re.MULTILINE)


@dataclass(frozen=True)
class ParsedDocument:
    """A document's text. ``pieces`` can be read once; concatenated they are the text."""

    title: str
    """Taken from the content; empty: it has none."""
    pieces: Iterator[str]
    markdown: bool


def parse(spool: BinaryIO, media_type: MediaType, document_id: str) -> ParsedDocument:
    """Text of a txt, md, html or pdf file. Reads as little as finds the title and the first text.

    Raises ``InvalidRequestError`` for what cannot be read and for a document without text.
    """
    title = ""
    why = ""
    if media_type is MediaType.PDF:
        pdf = open_pdf(spool)
        title, pieces, why = pdf.title, unwrap_lines(pdf.pages()), "a scanned pdf must be recognised (OCR) first"
    else:
        check_text(spool)
        if media_type is MediaType.HTML:
            title, pieces = html_title(read_text(spool)), html_text(read_text(spool))
        elif media_type is MediaType.MARKDOWN:
            title, pieces = _first_heading(next(read_text(spool), "")), read_text(spool)
        else:
            pieces = unwrap_lines(read_text(spool))
    first = next((piece for piece in pieces if piece.strip()), None)
    if first is None:
        raise no_text(why)
    return ParsedDocument(
        title=title[:_TITLE_CHARS] or title_from_id(document_id),
        pieces=itertools.chain([first], pieces),
        markdown=media_type is MediaType.MARKDOWN,
    )


def title_from_id(document_id: str) -> str:
    """``reports/annual_report-2024.txt`` → ``annual report-2024``."""
    path = PurePosixPath(document_id)
    name = path.stem if len(path.suffix) in range(2, 10) else path.name
    return " ".join(name.replace("_", " ").split()) or document_id


def unwrap_lines(pieces: Iterator[str]) -> Iterator[str]:
    """Joins lines that were broken to fit a page, so that passages end with sentences and not with lines."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        # A line is joined when the next one's start is known, so the last whole line waits.
        cut = text.rfind("\n", 0, max(text.rfind("\n"), 0)) + 1
        if len(text) - cut > 1 << 17:
            cut = len(text)
        rest = text[cut:]
        if cut:
            yield _WRAPPED.sub(r"\1 ", text[:cut])
    if rest:
        yield _WRAPPED.sub(r"\1 ", rest)


def _first_heading(start: str) -> str:
    heading = _HEADING.search(start)
    return " ".join(heading[1].split()) if heading else ""
