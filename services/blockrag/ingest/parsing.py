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
# A line that was broken to fit a page is neither short (verse, headings) nor longer than any page, and what follows
# is no list item, quotation or table.
_WRAPPED_CHARS = range(30, 111)
_STARTS_ANEW = re.compile(r"[\s\-*•#>|+]|\d{1,3}[.)]\s")
_LONGEST_HELD = 1 << 17


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
    held = ""
    for piece in pieces:
        lines = (held + piece).split("\n")
        # Whether a line goes on is decided when the next one is known: the last two wait.
        held = "\n".join(lines[-2:])
        if len(lines) > 2:
            yield _joined(lines[:-1])
        if len(held) > _LONGEST_HELD:
            yield held
            held = ""
    yield _joined([*held.split("\n"), ""])[:-1]


def _joined(lines: list[str]) -> str:
    """All lines but the last, each with the newline or the space that stands before the next."""
    parts: list[str] = []
    for line, following in itertools.pairwise(lines):
        goes_on = len(line) in _WRAPPED_CHARS and following and not _STARTS_ANEW.match(following)
        parts += (line, " " if goes_on else "\n")
    return "".join(parts)


def _first_heading(start: str) -> str:
    heading = _HEADING.search(start)
    return " ".join(heading[1].split()) if heading else ""
