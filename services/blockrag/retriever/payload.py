"""What a passage's point holds beside its vectors, the same in both engines; and filters on metadata.

Engines index and compare JSON values each in their own way (the embedded one cannot match booleans, none can quote
every key), so passages carry two derived fields that both engines treat alike: ``terms``, one keyword for each
metadata key and value, and ``numbers``, a number for each key with a name that needs no quoting.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from google.protobuf.struct_pb2 import Value

from blockrag.errors import InvalidRequestError
from blockrag.identity import check_normalised
from blockrag.metadata import check_filter, scalars
from blockrag.retriever.vector_index import Document, Passage, too_few_staged
from blockrag.v1.common_pb2 import ConditionOperator, MetadataCondition

T = TypeVar("T", Document, Passage)

_READABLE_CHARS = 96

Scalar = str | float | bool


@dataclass(frozen=True)
class AnyTerm:
    """The passage has one of these terms, or when ``negated`` none of them."""

    terms: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True)
class NumberRange:
    """The passage has a number in this field of ``numbers`` within the bounds."""

    field: str
    at_least: float | None = None
    at_most: float | None = None


Condition = AnyTerm | NumberRange


def parse_conditions(messages: Sequence[MetadataCondition]) -> tuple[Condition, ...]:
    """Checks a request's filter. Raises ``InvalidRequestError`` naming the field."""
    check_filter(messages)
    return tuple(map(_condition, messages))


def metadata_terms(metadata: Mapping[str, Any]) -> list[str]:
    """Terms of a document: one for each string, number and boolean in it, see ``scalars``."""
    return sorted({_term(key, value) for key, value in scalars(metadata)})


def metadata_numbers(metadata: Mapping[str, Any]) -> dict[str, list[float]]:
    """Numbers of a document by the name of their field; booleans are no numbers."""
    numbers: dict[str, list[float]] = {}
    for key, value in scalars(metadata):
        if isinstance(value, float):
            numbers.setdefault(number_field(key), []).append(value)
    return numbers


def number_field(key: str) -> str:
    """Name of a key's field in ``numbers``: letters and digits only."""
    return "k" + hashlib.blake2b(key.encode(), digest_size=10).hexdigest()


def _condition(message: MetadataCondition) -> Condition:
    check_normalised("filter", message.key)
    values = [_value(value) for value in message.values]
    if message.operator in (ConditionOperator.CONDITION_OPERATOR_IN, ConditionOperator.CONDITION_OPERATOR_NOT_IN):
        terms = tuple(dict.fromkeys(_term(message.key, value) for value in values))
        return AnyTerm(terms, negated=message.operator == ConditionOperator.CONDITION_OPERATOR_NOT_IN)
    (bound,) = (float(value) for value in values)
    if message.operator == ConditionOperator.CONDITION_OPERATOR_AT_LEAST:
        return NumberRange(number_field(message.key), at_least=bound)
    return NumberRange(number_field(message.key), at_most=bound)


def _value(value: Value) -> Scalar:
    if value.WhichOneof("kind") == "string_value":
        check_normalised("filter", value.string_value)
        return value.string_value
    return value.bool_value if value.WhichOneof("kind") == "bool_value" else value.number_value


def _term(key: str, value: Scalar) -> str:
    term = json.dumps([key, value], ensure_ascii=False)
    if len(term) <= _READABLE_CHARS:
        return term
    return hashlib.blake2b(term.encode(), digest_size=20).hexdigest()


DENSE = "dense"
BM25 = "bm25"

STATE = "state"
STAGED = "staged"
VISIBLE = "visible"
DOCUMENT = "document"
"""State of the points that are no passages but the catalogue's entries (server only)."""
MODEL = "model"
"""State of the one point that names the embedding model (server only)."""

DOCUMENT_ID = "document_id"
VERSION = "version"
ORDINAL = "ordinal"
PASSAGE_ID = "passage_id"
TITLE = "title"
COMMIT = "commit"
"""Mark of the commit that showed a passage; in a catalogue entry, of the one that is shown."""
SINCE = "since"
"""Since when a passage waits to be shown, or to be removed, in seconds since 1970; absent when it is settled."""
DIGEST = "digest"
"""Equal for equal texts."""
TERMS = "terms"
NUMBERS = "numbers"

KEYWORD_FIELDS = (STATE, DOCUMENT_ID, VERSION, COMMIT, DIGEST, TERMS)
"""Fields that searches and commits select by; the engines index them."""


def passage_payload(passage: Passage, staged_at: float) -> dict[str, Any]:
    """The payload of a staged passage. ``staged_at``: seconds since 1970."""
    return {
        STATE: STAGED,
        SINCE: staged_at,
        **vars(passage),
        DIGEST: text_digest(passage.text),
        TERMS: metadata_terms(passage.metadata),
        NUMBERS: metadata_numbers(passage.metadata),
    }


def text_digest(text: str) -> str:
    """Equal for texts that differ in white space at most."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).hexdigest()


def passage_of(payload: Mapping[str, Any]) -> Passage:
    """The passage that a point holds."""
    return _read(Passage, payload)


def new_commit() -> str:
    """A mark that no other commit has."""
    return uuid.uuid4().hex


def new_point() -> str:
    """The id of a point that holds a staged passage."""
    return str(uuid.uuid4())


def one_for_each_place(points: Iterable[tuple[str, Mapping[str, Any]]], document: Document) -> list[str]:
    """Of staged points, ids with their payloads, one for each passage's ordinal: the same for every caller.

    Raises ``InvalidRequestError`` when too few are staged.
    """
    chosen: dict[int, str] = {}
    for point_id, payload in points:
        ordinal = int(payload[ORDINAL])
        if ordinal < document.passages:
            chosen[ordinal] = min(point_id, chosen.get(ordinal, point_id))
    if len(chosen) < document.passages:
        raise InvalidRequestError("passages", too_few_staged(len(chosen), document))
    return [chosen[ordinal] for ordinal in sorted(chosen)]


def document_payload(document: Document) -> dict[str, Any]:
    """The payload of a catalogue entry."""
    return {STATE: DOCUMENT, **vars(document)}


def document_of(payload: Mapping[str, Any]) -> Document:
    """The document that a catalogue entry describes."""
    return _read(Document, payload)


def _read(kind: type[T], payload: Mapping[str, Any]) -> T:
    """A ``Passage`` or ``Document``, whose fields the payload has by their names."""
    known = {field.name: payload[field.name] for field in fields(kind) if field.name != "metadata"}
    return kind(**known, metadata=dict(payload.get("metadata") or {}))
