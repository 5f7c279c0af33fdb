"""A received file → documents ready for the index.

``prepare_documents`` reads the file once to check and to hash it, so that nearly all bad input is refused before
anything is stored; passages are made while they are consumed, so memory does not grow with the document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from blockrag.errors import InvalidRequestError
from blockrag.ingest.jsonl import check_jsonl, read_jsonl
from blockrag.ingest.media import READ_BYTES, MediaType, clean_text, clean_title, media_type_of, no_text
from blockrag.ingest.parsing import PARSER_VERSION, ParsedDocument, parse, title_from_id
from blockrag.ingest.splitting import PassageSplitter
from blockrag.retriever.identity import check_document_id


@dataclass(frozen=True)
class SourceDocument:
    """What the user says about a file."""

    document_id: str
    title: str = ""
    """Empty: taken from the content, else from the id."""
    media_type: str = ""
    """Empty: by the id's suffix."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values. Of a jsonl file: defaults for the lines' own."""


@dataclass(frozen=True)
class PreparedDocument:
    """One document on its way into the index."""

    document_id: str
    version: str
    """SHA-256 of content, title, metadata, media type and how it is split: equal versions have equal passages."""
    title: str
    passage_title: str
    """The title that passages carry: equal to ``title`` unless that takes more than half of a passage."""
    metadata: dict[str, Any]
    passages: Iterator[str]
    """The passages' texts in order, made while they are consumed. May raise ``InvalidRequestError``."""

    @property
    def title_cut(self) -> bool:
        """Passages carry only the title's beginning."""
        return self.passage_title != self.title


def prepare_documents(spool: BinaryIO, source: SourceDocument, splitter: PassageSplitter) -> Iterator[PreparedDocument]:
    """The documents of one received file: one, or one for each line of a jsonl file.

    ``spool`` is seekable and stays open until the last passage is consumed. Consume a document's passages before the
    next document, or not at all. Blocking: call it, and every ``next``, outside of an event loop.

    Raises ``InvalidRequestError`` naming the field: ``document_id``, ``media_type``, ``title``, ``metadata`` or
    ``content``.
    """
    check_document_id(source.document_id)
    _canonical(source.metadata)
    media_type = media_type_of(source.media_type, source.document_id)
    if not spool.seek(0, 2):
        raise InvalidRequestError("content", "the file is empty")
    if media_type is MediaType.JSONL:
        return _prepare_lines(spool, source, splitter)
    return iter([_prepare_file(spool, source, media_type, splitter)])


def _prepare_file(
    spool: BinaryIO, source: SourceDocument, media_type: MediaType, splitter: PassageSplitter
) -> PreparedDocument:
    parsed = parse(spool, media_type, source.document_id)
    return _prepare(source, parsed, media_type, _file_hash(spool), splitter)


def _prepare_lines(spool: BinaryIO, source: SourceDocument, splitter: PassageSplitter) -> Iterator[PreparedDocument]:
    check_jsonl(spool)
    empty = True
    for line in read_jsonl(spool):
        empty = False
        own = SourceDocument(line.document_id, line.title, "", {**source.metadata, **line.metadata})
        parsed = ParsedDocument(title_from_id(line.document_id), iter([clean_text(line.text)]), markdown=False)
        content = hashlib.sha256(line.text.encode()).digest()
        yield _prepare(own, parsed, MediaType.JSONL, content, splitter)
    if empty:
        raise no_text()


def _prepare(
    source: SourceDocument, parsed: ParsedDocument, media_type: MediaType, content: bytes, splitter: PassageSplitter
) -> PreparedDocument:
    title = clean_title(source.title) or clean_title(parsed.title)
    fitted = splitter.fit_title(title)
    digest = hashlib.sha256()
    for part in (
        str(PARSER_VERSION).encode(),
        splitter.fingerprint.encode(),
        media_type.value.encode(),
        title.encode(),
        _canonical(source.metadata),
        content,
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return PreparedDocument(
        document_id=source.document_id,
        version=digest.hexdigest(),
        title=title,
        passage_title=fitted.text,
        metadata=dict(source.metadata),
        passages=splitter.split(fitted, parsed.pieces, markdown=parsed.markdown),
    )


def _canonical(metadata: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("metadata", f"is not JSON: {error}") from None


def _file_hash(spool: BinaryIO) -> bytes:
    spool.seek(0)
    digest = hashlib.sha256()
    while data := spool.read(READ_BYTES):
        digest.update(data)
    return digest.digest()
