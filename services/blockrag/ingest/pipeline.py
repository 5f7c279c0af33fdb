"""A parsed file → documents ready for the index. Passages are made while they are consumed."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from blockrag.characters import clean_line, normalise
from blockrag.errors import InvalidRequestError
from blockrag.identity import check_document_id
from blockrag.ingest.json_documents import read_documents
from blockrag.ingest.media import READ_BYTES, MediaType, media_type_of
from blockrag.ingest.parsing import PARSER_VERSION, ParsedFile
from blockrag.ingest.splitting import PassageSplitter, title_from_id
from blockrag.metadata import canonical, checked_metadata


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
    """The passages' texts in order, made while they are consumed."""


@dataclass(frozen=True)
class CheckedSource:
    """A source whose every field can be."""

    source: SourceDocument
    """Normalised."""
    media_type: MediaType


def check_source(source: SourceDocument) -> CheckedSource:
    """Raises ``InvalidRequestError`` naming ``document_id``, ``media_type`` or ``metadata``."""
    source = replace(source, document_id=normalise(source.document_id), title=clean_line(source.title))
    check_document_id(source.document_id)
    source = replace(source, metadata=checked_metadata(source.metadata))
    return CheckedSource(source, media_type_of(source.media_type, source.document_id))


def check_spool(spool: BinaryIO) -> int:
    """The file's size in bytes. Raises ``InvalidRequestError`` for an empty one."""
    size = spool.seek(0, 2)
    if not size:
        raise InvalidRequestError("content", "the file is empty")
    return size


def documents_of(
    parsed: ParsedFile, text: BinaryIO, checked: CheckedSource, splitter: PassageSplitter
) -> Iterator[PreparedDocument]:
    """The documents of a parsed file, whose ``text`` stays open until the last passage is consumed. Blocking."""
    if checked.media_type is MediaType.JSONL:
        for line in read_documents(text):
            content = hashlib.sha256(line.text.encode()).hexdigest()
            own = SourceDocument(line.document_id, line.title, "", line.metadata)
            yield _prepare(own, ParsedFile("", content, line.metadata), iter([line.text]), checked.media_type, splitter)
    else:
        yield _prepare(checked.source, parsed, _pieces(text), checked.media_type, splitter)


def _prepare(
    source: SourceDocument,
    parsed: ParsedFile,
    pieces: Iterator[str],
    media_type: MediaType,
    splitter: PassageSplitter,
) -> PreparedDocument:
    title = source.title or parsed.title or title_from_id(source.document_id)
    fitted = splitter.fit_title(title)
    digest = hashlib.sha256()
    for part in (
        str(PARSER_VERSION).encode(),
        splitter.fingerprint.encode(),
        media_type.value.encode(),
        title.encode(),
        canonical(parsed.metadata),
        parsed.content_sha256.encode(),
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return PreparedDocument(
        document_id=source.document_id,
        version=digest.hexdigest(),
        title=title,
        passage_title=fitted.text,
        metadata=dict(parsed.metadata),
        passages=splitter.split(fitted, pieces, markdown=media_type is MediaType.MARKDOWN),
    )


def _pieces(text: BinaryIO) -> Iterator[str]:
    """The text from its start, in pieces of about ``READ_BYTES``. Others may move the file's position meanwhile."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = 0
    while True:
        text.seek(position)
        data = text.read(READ_BYTES)
        position += len(data)
        if piece := decoder.decode(data, final=not data):
            yield piece
        if not data:
            return
