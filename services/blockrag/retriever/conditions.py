"""Filters on metadata.

Engines index and compare JSON values each in their own way (the embedded one cannot match booleans, none can quote
every key), so passages carry two derived fields that both engines treat alike: ``terms``, one keyword for each
metadata key and value, and ``numbers``, a number for each key with a name that needs no quoting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.struct_pb2 import Value

from blockrag.identity import check_normalised
from blockrag.metadata import check_filter, scalars
from blockrag.v1.common_pb2 import ConditionOperator, MetadataCondition

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
