"""What may stand in a document's metadata: JSON values that the index and the protocol can hold exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct

from blockrag.characters import normalise_values
from blockrag.errors import InvalidRequestError
from blockrag.metadata import MAX_DEPTH, check_number

MAX_METADATA_BYTES = 8192
"""Largest metadata of a document: each of its passages carries it, and 256 of them must fit a message of 4 MB."""
MAX_KEY_CHARS = 128


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with its texts normalised. Raises ``ValueError`` saying which key cannot be kept, and why."""
    for name, value in metadata.items():
        _check_key(name)
        _check_value(name, value, 0)
    normalised = normalise_values(dict(metadata))
    struct = Struct()
    struct.update(normalised)
    if struct.ByteSize() > MAX_METADATA_BYTES:
        raise ValueError(f"has {struct.ByteSize()} bytes; at most {MAX_METADATA_BYTES} are allowed")
    kept: dict[str, Any] = normalised
    return kept


def canonical(metadata: Mapping[str, Any]) -> bytes:
    """Equal for equal metadata."""
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _check_key(name: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a key must be a text that is not empty")
    if len(name) > MAX_KEY_CHARS or not name.isprintable():
        raise ValueError(f"key {name[:80]!r}: must be one line of at most {MAX_KEY_CHARS} printable characters")


def _check_value(name: str, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{name!r}: is nested more than {MAX_DEPTH} deep")
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name!r}: holds half of a surrogate pair")
    elif isinstance(value, int | float):
        try:
            check_number(value, "metadata", repr(name))
        except InvalidRequestError as error:
            raise ValueError(error.problem) from None
    elif isinstance(value, list):
        for item in value:
            _check_value(name, item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_key(key)
            _check_value(name, item, depth + 1)
    else:
        raise ValueError(f"{name!r}: is not JSON but {type(value).__name__}")
