"""Metadata of documents, JSON objects that travel as protobuf structs, and conditions on it. A client imports it.

A struct's numbers are doubles. So a whole number that a double may have rounded is refused wherever it comes in, and a
whole number that is exact comes out as an int.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

from blockrag.characters import check_line, check_text, normalise_values
from blockrag.errors import InvalidRequestError
from blockrag.limits import MAX_CONDITION_VALUES, MAX_CONDITIONS
from blockrag.v1.common_pb2 import ConditionOperator, MetadataCondition

MAX_EXACT = 2**53
"""Whole numbers up to here are exact in a double; this one may stand for the next."""
MAX_DEPTH = 16
"""Objects and lists within each other; protobuf's own limit is little more than twice this."""
MAX_KEY_CHARS = 128
"""Longest name of a field."""
MAX_METADATA_BYTES = 8192
"""Largest metadata of a document: each of its passages carries it, and 256 of them must fit a message of 4 MB."""
MAX_TITLE_CHARS = 1024
"""Longest title, and text in a condition."""
_KEY_CHARS = 80
_KINDS = ("string_value", "number_value", "bool_value")


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Refuses what no struct can hold as it is. Raises ``InvalidRequestError`` naming the key."""
    for key, value in metadata.items():
        _check_name(key)
        _check(key, value, 1)


def check_number(value: float, field: str, what: str) -> None:
    """Refuses a number that is not finite, or not exact; ``what`` names it. Raises ``InvalidRequestError``."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError(field, f"{what} is {value}; leave it out, or send a finite number")
    if abs(value) >= MAX_EXACT and (isinstance(value, int) or value.is_integer()):
        raise InvalidRequestError(field, f"{what} is too large to be exact as a number; send it as text")


def check_filter(conditions: Sequence[MetadataCondition]) -> None:
    """Refuses conditions that cannot be evaluated. Raises ``InvalidRequestError`` naming the field."""
    if len(conditions) > MAX_CONDITIONS:
        raise InvalidRequestError("filter", f"has {len(conditions)} conditions; at most {MAX_CONDITIONS} are allowed")
    for index, condition in enumerate(conditions):
        field = f"filter[{index}]"
        check_key(f"{field}.key", condition.key)
        _check_values(field, condition)


def check_key(field: str, key: str) -> None:
    """Refuses what names no field."""
    if not key:
        raise InvalidRequestError(field, "must not be empty")
    check_line(field, key, MAX_KEY_CHARS)


def metadata_of(struct: Struct) -> dict[str, Any]:
    """A struct as JSON values; whole numbers become int. Raises as ``check_metadata``."""
    metadata = {key: _python(value) for key, value in struct.fields.items()}
    check_metadata(metadata)
    return metadata


def struct_of(metadata: Mapping[str, Any]) -> Struct:
    """JSON values as a struct. Raises as ``check_metadata``."""
    check_metadata(metadata)
    struct = Struct()
    struct.update(dict(metadata))
    return struct


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with its texts normalised. Raises ``InvalidRequestError`` saying which key cannot be kept."""
    check_metadata(metadata)
    try:
        normalised: dict[str, Any] = normalise_values(dict(metadata))
    except ValueError as error:
        raise InvalidRequestError("metadata", str(error)) from None
    size = struct_of(normalised).ByteSize()
    if size > MAX_METADATA_BYTES:
        raise InvalidRequestError("metadata", f"has {size} bytes; at most {MAX_METADATA_BYTES} are allowed")
    return normalised


def canonical(metadata: Mapping[str, Any]) -> bytes:
    """Equal for equal metadata."""
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def scalars(metadata: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """What filters compare: each string, number and boolean with its key.

    Elements of a list have the list's key; the keys of an object within are joined by dots: ``author.name``.
    """
    for key, value in metadata.items():
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, Mapping):
                yield from scalars(element, f"{prefix}{key}.")
            elif isinstance(element, bool | str):
                yield prefix + key, element
            elif isinstance(element, int | float):
                yield prefix + key, float(element)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequestError("metadata", "a key must be a text that is not empty")
    if len(name) > MAX_KEY_CHARS or not name.isprintable():
        problem = f"key {name[:_KEY_CHARS]!r}: must be one line of at most {MAX_KEY_CHARS} printable characters"
        raise InvalidRequestError("metadata", problem)


def _check(key: str, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequestError("metadata", f"{key[:_KEY_CHARS]!r} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _check_name(inner)
            _check(f"{key}.{inner}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(key, item, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_number(value, "metadata", repr(key[:_KEY_CHARS]))
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidRequestError("metadata", f"{key[:_KEY_CHARS]!r} holds half of a surrogate pair")
    elif value is not None and not isinstance(value, bool):
        kind = type(value).__name__
        raise InvalidRequestError("metadata", f"{key[:_KEY_CHARS]!r} is a {kind}; send text, numbers, lists or objects")


def _python(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) < MAX_EXACT else number
    if kind == "struct_value":
        return {key: _python(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_python(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def _check_values(field: str, condition: MetadataCondition) -> None:
    values = condition.values
    kinds = {value.WhichOneof("kind") for value in values}
    if condition.operator in (ConditionOperator.CONDITION_OPERATOR_IN, ConditionOperator.CONDITION_OPERATOR_NOT_IN):
        if not 1 <= len(values) <= MAX_CONDITION_VALUES:
            raise InvalidRequestError(f"{field}.values", f"must hold 1 to {MAX_CONDITION_VALUES} values")
        if not kinds <= set(_KINDS):
            raise InvalidRequestError(f"{field}.values", "must be strings, numbers or booleans, each value on its own")
        for index, value in enumerate(values):
            _check_value(f"{field}.values[{index}]", value)
    elif condition.operator in (
        ConditionOperator.CONDITION_OPERATOR_AT_LEAST,
        ConditionOperator.CONDITION_OPERATOR_AT_MOST,
    ):
        if len(values) != 1 or kinds != {"number_value"}:
            raise InvalidRequestError(f"{field}.values", "must be one number")
        _check_value(f"{field}.values[0]", values[0])
    else:
        raise InvalidRequestError(f"{field}.operator", "must be IN, NOT_IN, AT_LEAST or AT_MOST")


def _check_value(field: str, value: Value) -> None:
    if value.WhichOneof("kind") == "number_value":
        check_number(value.number_value, field, "the number")
    if value.WhichOneof("kind") == "string_value":
        if len(value.string_value) > MAX_TITLE_CHARS:
            raise InvalidRequestError(field, f"has more than {MAX_TITLE_CHARS} characters")
        check_text(field, value.string_value)
