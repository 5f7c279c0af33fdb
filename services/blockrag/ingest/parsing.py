"""A received file → text that passages are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from blockrag.characters import clean_text, is_blank
from blockrag.ingest.html import read_html
from blockrag.ingest.json_documents import copy_jsonl
from blockrag.ingest.markdown import read_markdown
from blockrag.ingest.media import MediaType, decode, no_text
from blockrag.ingest.pdf import read_pdf
from blockrag.ingest.plain import unwrap_lines
from blockrag.ingest.splitting import choose_title
from blockrag.metadata import checked_metadata

PARSER_VERSION = 2
"""Raise it when the same bytes would give other text: part of a document's version."""


@dataclass(frozen=True)
class ParsedFile:
    """What a file says besides its text."""

    title: str
    """Taken from the content; empty: it has none."""
    content_sha256: str
    """Of the file's bytes, hex."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the file says of itself and what its sender says, whose word goes first. Of a jsonl file: nothing."""


def parse(source: BinaryIO, target: BinaryIO, media_type: MediaType, metadata: Mapping[str, Any]) -> ParsedFile:
    """Reads a file and writes its text to ``target``: UTF-8, of a jsonl file a normalised line for each document.

    ``metadata``: what the sender says, checked. Takes memory of several times the file's size. Raises
    ``InvalidRequestError`` for what cannot be read and for a file without text.
    """
    pieces: Iterator[str]
    titles: list[str] = []
    fields: dict[str, Any] = {}
    why = ""
    source.seek(0)
    digest = hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
    if media_type is MediaType.JSONL:
        copy_jsonl(source, target, metadata)
        return ParsedFile("", digest)
    if media_type is MediaType.PDF:
        titles, pages = read_pdf(source)
        pieces, why = (unwrap_lines(page) for page in pages), "a scanned pdf must be recognised (OCR) first"
    else:
        source.seek(0)
        text = decode(source.read())
        if media_type is MediaType.HTML:
            titles, text = read_html(text)
            # Character references bring in what the file's own characters were cleaned of.
            text = clean_text(text)
        elif media_type is MediaType.MARKDOWN:
            titles, fields, text = read_markdown(text)
        else:
            text = unwrap_lines(text)
        pieces = iter([text])
    if not _write(pieces, target):
        raise no_text(why)
    return ParsedFile(choose_title(titles), digest, checked_metadata({**fields, **metadata}))


def _write(pieces: Iterator[str], target: BinaryIO) -> bool:
    has_text = False
    for piece in pieces:
        has_text = has_text or not is_blank(piece)
        target.write(piece.encode())
    return has_text
