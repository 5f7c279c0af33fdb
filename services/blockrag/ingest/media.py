"""Which kind of file a document is, and bytes to text."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePosixPath
from typing import BinaryIO

from blockrag.errors import InvalidRequestError


class MediaType(Enum):
    """The kinds of document that can be ingested."""

    TEXT = "text/plain"
    MARKDOWN = "text/markdown"
    HTML = "text/html"
    PDF = "application/pdf"
    JSONL = "application/jsonl"


_SUFFIXES = {
    ".txt": MediaType.TEXT,
    ".text": MediaType.TEXT,
    ".md": MediaType.MARKDOWN,
    ".markdown": MediaType.MARKDOWN,
    ".html": MediaType.HTML,
    ".htm": MediaType.HTML,
    ".xhtml": MediaType.HTML,
    ".pdf": MediaType.PDF,
    ".jsonl": MediaType.JSONL,
    ".ndjson": MediaType.JSONL,
}
_ALIASES = {
    "text/x-markdown": MediaType.MARKDOWN,
    "application/xhtml+xml": MediaType.HTML,
    "application/x-ndjson": MediaType.JSONL,
    "application/x-jsonlines": MediaType.JSONL,
    "application/json-lines": MediaType.JSONL,
}
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive or an Office file"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90", "a program"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
    (b"%PDF-", "a pdf; its media type is application/pdf"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
)

READ_BYTES = 1 << 16
"""Bytes read at a time. Part of what decides where passages end, so a change makes new document versions."""

# Tabs and newlines stay; form feeds and vertical tabs become newlines; the rest of C0, DEL and C1 goes.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]) | {9: "\t", 10: "\n", 11: "\n", 12: "\n\n", 0x85: "\n"}
_STRANGE = re.compile("[\x00-\x06\x0e-\x1a\x1c-\x1f]")
_STRANGE_LEAST = 8
_STRANGE_SHARE = 0.01


def media_type_of(declared: str, document_id: str) -> MediaType:
    """The declared media type, or when empty the one that the id's suffix stands for."""
    if declared.strip():
        name, _, parameters = declared.partition(";")
        charset = re.search(r"charset\s*=\s*\"?([\w.-]+)", parameters, re.IGNORECASE)
        if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
            raise InvalidRequestError("media_type", f"charset {charset[1]} is not supported; send UTF-8")
        name = name.strip().lower()
        known = _ALIASES.get(name)
        if known is not None:
            return known
        try:
            return MediaType(name)
        except ValueError:
            raise InvalidRequestError("media_type", f"{name[:80]!r} is none of {_supported()}") from None
    suffix = PurePosixPath(document_id).suffix.lower()
    if suffix not in _SUFFIXES:
        raise InvalidRequestError(
            "media_type",
            f"missing, and the id's suffix {suffix[:20]!r} is none of {', '.join(sorted(_SUFFIXES))};"
            f" send one of {_supported()}",
        )
    return _SUFFIXES[suffix]


def read_text(spool: BinaryIO) -> Iterator[str]:
    """The text of a UTF-8 file from its start, in pieces of about ``READ_BYTES``, newlines as ``\\n``.

    A byte order mark and control characters are left out. Others may move the file's position meanwhile. Raises
    ``InvalidRequestError`` naming the byte offset of what is not UTF-8, or saying what kind of file it seems to be.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    while True:
        spool.seek(position)
        data = spool.read(READ_BYTES)
        if position == 0:
            _refuse_signatures(data)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = position - held + error.start
            raise InvalidRequestError("content", f"is not UTF-8: byte {offset} cannot be decoded") from None
        position += len(data)
        piece = newlines.decode(text, final=not data).translate(_CONTROLS)
        if piece:
            yield piece
        if not data:
            return


def check_text(spool: BinaryIO) -> None:
    """Reads the whole file once. Raises as ``read_text`` does, and for a file without text or full of controls."""
    strange = size = 0
    has_text = False
    for piece in read_text(spool):
        has_text = has_text or not piece.isspace()
    spool.seek(0)
    while data := spool.read(READ_BYTES):
        size += len(data)
        strange += len(_STRANGE.findall(data.decode("latin-1")))
    if strange >= _STRANGE_LEAST and strange > size * _STRANGE_SHARE:
        raise InvalidRequestError("content", f"looks like a binary file: {strange} of its {size} bytes are controls")
    if not has_text:
        raise no_text()


def clean_text(text: str) -> str:
    """Text that did not come through ``read_text``, without control characters and with ``\\n`` as newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)


def clean_title(title: str) -> str:
    """A title on one line."""
    return " ".join(clean_text(title).split())


def no_text(why: str = "") -> InvalidRequestError:
    """The error for a document that holds no text."""
    return InvalidRequestError("content", "the document has no text" + (f": {why}" if why else ""))


def _refuse_signatures(start: bytes) -> None:
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            raise InvalidRequestError("content", f"is no text but {kind}")


def _supported() -> str:
    return ", ".join(kind.value for kind in MediaType)
