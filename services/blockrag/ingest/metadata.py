"""The metadata that a document is stored with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blockrag.characters import normalise_values
from blockrag.errors import InvalidRequestError
from blockrag.metadata import check_metadata, struct_of

MAX_METADATA_BYTES = 8192
"""Largest metadata of a document: each of its passages carries it, and 256 of them must fit a message of 4 MB."""


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with its texts normalised. Raises ``ValueError`` saying which key cannot be kept, and why."""
    try:
        check_metadata(metadata)
        normalised: dict[str, Any] = normalise_values(dict(metadata))
        size = struct_of(normalised).ByteSize()
    except InvalidRequestError as error:
        raise ValueError(error.problem) from None
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"has {size} bytes; at most {MAX_METADATA_BYTES} are allowed")
    return normalised


def canonical(metadata: Mapping[str, Any]) -> bytes:
    """Equal for equal metadata."""
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()
