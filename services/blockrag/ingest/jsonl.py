"""JSON lines: each line ``{"id", "title", "text", "metadata"}`` is a document of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import check_text
from blockrag.metadata import check_metadata
from blockrag.retriever.identity import check_document_id

MAX_LINE_BYTES = 8 << 20
"""Longest line. Keeps memory bounded: a line is read as a whole."""

_KEYS = frozenset({"id", "title", "text", "metadata"})


@dataclass(frozen=True)
class JsonDocument:
    """One line."""

    document_id: str
    title: str
    text: str
    metadata: dict[str, Any]


def check_jsonl(spool: BinaryIO) -> None:
    """Checks every line before anything is stored. Raises ``InvalidRequestError`` naming the line."""
    check_text(spool)
    first_lines: dict[bytes, int] = {}
    for number, document in _lines(spool):
        digest = hashlib.blake2b(document.document_id.encode(), digest_size=12).digest()
        if digest in first_lines:
            _refuse(number, f"has the same id as line {first_lines[digest]}: {document.document_id!r}")
        first_lines[digest] = number


def read_jsonl(spool: BinaryIO) -> Iterator[JsonDocument]:
    """The documents in order. Other readers may move the file's position meanwhile."""
    for _, document in _lines(spool):
        yield document


def _lines(spool: BinaryIO) -> Iterator[tuple[int, JsonDocument]]:
    position = number = 0
    while True:
        spool.seek(position)
        line = spool.readline(MAX_LINE_BYTES + 1)
        position = spool.tell()
        number += 1
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            _refuse(number, f"is longer than {MAX_LINE_BYTES >> 20} MiB")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, _document(number, line)


def _document(number: int, line: bytes) -> JsonDocument:
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(number, f"is not JSON: {error}")
    if not isinstance(value, dict):
        _refuse(number, "is not a JSON object")
    if unknown := sorted(value.keys() - _KEYS):
        _refuse(number, f'unknown key {unknown[0][:80]!r}; put further fields into "metadata"')
    document_id = value.get("id")
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    title, text, metadata = value.get("title", ""), value.get("text"), value.get("metadata", {})
    if not isinstance(document_id, str):
        _refuse(number, '"id" must be a string')
    if not isinstance(title, str):
        _refuse(number, '"title" must be a string')
    if not isinstance(text, str) or not text.strip():
        _refuse(number, '"text" must be a string that is not empty')
    if not isinstance(metadata, dict):
        _refuse(number, '"metadata" must be an object')
    try:
        line_text = json.dumps([document_id, title, text, metadata], ensure_ascii=False)
        line_text.encode()
        check_document_id(document_id)
    except UnicodeEncodeError:
        _refuse(number, "holds half of a surrogate pair")
    except InvalidRequestError as error:
        _refuse(number, f'"id": {error.problem}')
    try:
        check_metadata(metadata)
    except InvalidRequestError as error:
        _refuse(number, f'"metadata": {error.problem}')
    return JsonDocument(document_id, title, text, metadata)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(number: int, problem: str) -> NoReturn:
    raise InvalidRequestError("content", f"line {number}: {problem}")
