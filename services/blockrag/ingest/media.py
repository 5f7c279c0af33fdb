"""Which kind of file a document is, and bytes to text."""

from __future__ import annotations

import codecs
import re
from enum import Enum
from pathlib import PurePosixPath

from blockrag.characters import clean_text, is_blank
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
# How files begin that are no text. All but a pdf's hold bytes that text does not, so they only explain a refusal.
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive or an Office file"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90", "a program"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
)
_PDF = re.compile(rb"%PDF-\d\.\d\s*[\r\n]")

READ_BYTES = 1 << 16
"""Bytes read at a time. Part of what decides where passages end, so a change makes new document versions."""

_STRANGE = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")
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
        try:
            return _ALIASES.get(name) or MediaType(name)
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


def known_suffix(name: str) -> str:
    """The suffix of a file's name, if it is one of a kind that can be ingested; else nothing."""
    suffix = PurePosixPath(name).suffix
    return suffix if suffix.lower() in _SUFFIXES else ""


def decode(data: bytes) -> str:
    """The text of a UTF-8 file, cleaned (``characters.clean_text``).

    Raises ``InvalidRequestError`` naming the byte offset of what is not UTF-8, or saying what kind of file it seems to
    be, and for a file that is full of controls or has no text.
    """
    strange = len(_STRANGE.findall(data))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse_signatures(data)
        raise InvalidRequestError("content", f"is not UTF-8: byte {error.start} cannot be decoded") from None
    if strange:
        _refuse_signatures(data)
    if strange >= _STRANGE_LEAST and strange > len(data) * _STRANGE_SHARE:
        raise InvalidRequestError(
            "content", f"looks like a binary file: {strange} of its {len(data)} bytes are controls"
        )
    if _PDF.match(data):
        raise InvalidRequestError("content", "is no text but a pdf; its media type is application/pdf")
    text = clean_text(text)
    if is_blank(text):
        raise no_text()
    return text


def no_text(why: str = "") -> InvalidRequestError:
    """The error for a document that holds no text."""
    return InvalidRequestError("content", "the document has no text" + (f": {why}" if why else ""))


def _refuse_signatures(start: bytes) -> None:
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            raise InvalidRequestError("content", f"is no text but {kind}")


def _supported() -> str:
    return ", ".join(kind.value for kind in MediaType)
