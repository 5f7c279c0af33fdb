"""JSON lines: each line ``{"id", "title", "text", "metadata"}`` is a document of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NoReturn

from blockrag.characters import clean_line, clean_text, is_blank, normalise
from blockrag.errors import InvalidRequestError
from blockrag.identity import check_document_id
from blockrag.ingest.media import no_text
from blockrag.metadata import MAX_TITLE_CHARS, checked_metadata

MAX_LINE_BYTES = 8 << 20
"""Longest line. Keeps memory bounded: a line is read as a whole."""

_KEYS = frozenset({"id", "title", "text", "metadata"})


@dataclass(frozen=True)
class JsonDocument:
    """One line, normalised."""

    document_id: str
    title: str
    """Empty: the line names none."""
    text: str
    metadata: dict[str, Any]


def copy_jsonl(source: BinaryIO, target: BinaryIO, defaults: Mapping[str, Any]) -> None:
    """Checks every line and writes its document to ``target``, for ``read_documents``.

    ``defaults``: metadata of lines that do not say otherwise. Raises ``InvalidRequestError`` naming the line.
    """
    first_lines: dict[bytes, int] = {}
    for number, line in _lines(source):
        document = _document(number, line, defaults)
        digest = hashlib.blake2b(document.document_id.encode(), digest_size=12).digest()
        if digest in first_lines:
            _refuse(number, f"has the same id as line {first_lines[digest]}: {document.document_id!r}")
        first_lines[digest] = number
        target.write(json.dumps(asdict(document)).encode() + b"\n")
    if not first_lines:
        raise no_text()


def read_documents(spool: BinaryIO) -> Iterator[JsonDocument]:
    """The documents in order. Others may move the file's position meanwhile."""
    position = 0
    while True:
        spool.seek(position)
        line = spool.readline()
        position = spool.tell()
        if not line:
            return
        yield JsonDocument(**json.loads(line))


def _lines(source: BinaryIO) -> Iterator[tuple[int, bytes]]:
    source.seek(0)
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            _refuse(number, f"is longer than {MAX_LINE_BYTES >> 20} MiB")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _document(number: int, line: bytes, defaults: Mapping[str, Any]) -> JsonDocument:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(number, f"is not UTF-8: its byte {error.start} cannot be decoded")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(number, f"is not JSON: {error}")
    if not isinstance(value, dict):
        _refuse(number, "is not a JSON object")
    if unknown := sorted(value.keys() - _KEYS):
        _refuse(number, f'unknown key {unknown[0][:80]!r}; put further fields into "metadata"')
    return _checked(number, value, defaults)


def _checked(number: int, value: dict[str, Any], defaults: Mapping[str, Any]) -> JsonDocument:
    document_id = value.get("id")
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    # What has no value is null in what many programs write.
    title, text, metadata = value.get("title"), value.get("text"), value.get("metadata")
    title = "" if title is None else title
    metadata = {} if metadata is None else metadata
    if not isinstance(document_id, str):
        _refuse(number, '"id" must be a string')
    if not isinstance(title, str):
        _refuse(number, '"title" must be a string')
    if not isinstance(text, str):
        _refuse(number, '"text" must be a string that is not empty')
    if not isinstance(metadata, dict):
        _refuse(number, '"metadata" must be an object')
    if any("\ud800" <= character <= "\udfff" for part in (document_id, title, text) for character in part):
        _refuse(number, "holds half of a surrogate pair")
    document_id, title, text = normalise(document_id), clean_line(title), clean_text(text)
    if is_blank(text):  # what cleaning takes away is nothing to see either
        _refuse(number, '"text" must be a string that is not empty')
    if len(title) > MAX_TITLE_CHARS:
        _refuse(number, f'"title" has {len(title)} characters; at most {MAX_TITLE_CHARS} are allowed')
    try:
        check_document_id(document_id)
    except InvalidRequestError as error:
        _refuse(number, f'"id": {error.problem}')
    try:
        metadata = checked_metadata({**defaults, **metadata})
    except InvalidRequestError as error:
        _refuse(number, f'"metadata": {error.problem}')
    return JsonDocument(document_id, title, text, metadata)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(number: int, problem: str) -> NoReturn:
    raise InvalidRequestError("content", f"line {number}: {problem}")
