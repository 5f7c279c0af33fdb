"""Filters on metadata.

Engines index and compare JSON values each in their own way (the embedded one cannot match booleans, none can quote
every key), so passages carry two derived fields that both engines treat alike: ``terms``, one keyword for each
metadata key and value, and ``numbers``, a number for each key with a name that needs no quoting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.struct_pb2 import Value

from blockrag.errors import InvalidRequestError
from blockrag.limits import MAX_CONDITION_VALUES, MAX_CONDITIONS
from blockrag.metadata import check_number, scalars
from blockrag.retriever.identity import check_normalised
from blockrag.v1 import common_pb2

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


def parse_conditions(messages: Iterable[common_pb2.MetadataCondition]) -> tuple[Condition, ...]:
    """Checks a request's filter. Raises ``InvalidRequestError('filter', …)`` naming the condition."""
    conditions = tuple(_condition(number, message) for number, message in enumerate(messages))
    if len(conditions) > MAX_CONDITIONS:
        raise InvalidRequestError("filter", f"has {len(conditions)} conditions; at most {MAX_CONDITIONS} are allowed")
    return conditions


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


def _condition(number: int, message: common_pb2.MetadataCondition) -> Condition:
    where = f"condition {number + 1}"
    if not message.key:
        raise InvalidRequestError("filter", f"{where}: the key is empty")
    check_normalised("filter", message.key)
    where += f" on {message.key[:80]!r}"
    operator = message.operator
    if operator not in (
        common_pb2.CONDITION_OPERATOR_IN,
        common_pb2.CONDITION_OPERATOR_NOT_IN,
        common_pb2.CONDITION_OPERATOR_AT_LEAST,
        common_pb2.CONDITION_OPERATOR_AT_MOST,
    ):
        raise InvalidRequestError("filter", f"{where}: the operator is missing or unknown")
    if not message.values:
        raise InvalidRequestError("filter", f"{where}: has no values")
    if len(message.values) > MAX_CONDITION_VALUES:
        raise InvalidRequestError("filter", f"{where}: has more than {MAX_CONDITION_VALUES} values")
    values = [_value(where, value) for value in message.values]
    if operator in (common_pb2.CONDITION_OPERATOR_IN, common_pb2.CONDITION_OPERATOR_NOT_IN):
        terms = tuple(dict.fromkeys(_term(message.key, value) for value in values))
        return AnyTerm(terms, negated=operator == common_pb2.CONDITION_OPERATOR_NOT_IN)
    bound = _bound(where, values)
    if operator == common_pb2.CONDITION_OPERATOR_AT_LEAST:
        return NumberRange(number_field(message.key), at_least=bound)
    return NumberRange(number_field(message.key), at_most=bound)


def _bound(where: str, values: Sequence[Scalar]) -> float:
    if len(values) != 1:
        raise InvalidRequestError("filter", f"{where}: needs exactly one number")
    (bound,) = values
    if not isinstance(bound, float):
        raise InvalidRequestError("filter", f"{where}: the bound must be a number")
    return bound


def _value(where: str, value: Value) -> Scalar:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        check_normalised("filter", value.string_value)
        return value.string_value
    if kind == "bool_value":
        return value.bool_value
    if kind == "number_value":
        check_number(value.number_value, "filter", f"{where}: a number")
        return value.number_value
    raise InvalidRequestError("filter", f"{where}: values must be strings, numbers or booleans")


def _term(key: str, value: Scalar) -> str:
    term = json.dumps([key, value], ensure_ascii=False)
    if len(term) <= _READABLE_CHARS:
        return term
    return hashlib.blake2b(term.encode(), digest_size=20).hexdigest()
