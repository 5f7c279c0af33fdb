"""Names and ids: which collection, which document, which passage, and where a page of documents begins."""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
import uuid
from dataclasses import dataclass

from blockrag.characters import is_blank, normalise
from blockrag.errors import InvalidRequestError
from blockrag.limits import TENANT_PATTERN

DEFAULT_COLLECTION = "default"
"""The collection of requests that name none."""
MAX_DOCUMENT_ID_CHARS = 512

_COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TENANT_NAME = re.compile(TENANT_PATTERN)
_PASSAGE_NAMESPACE = uuid.UUID("6f1d3a52-7e0b-5c53-9a54-0e2f7b8c1d90")


@dataclass(frozen=True, order=True)
class CollectionId:
    """A tenant's collection. Equal names of two tenants are two collections."""

    tenant: str
    name: str

    def __post_init__(self) -> None:
        if not _TENANT_NAME.fullmatch(self.tenant):
            raise InvalidRequestError(
                "tenant", "must be lower-case letters, digits, _ and -, at most 63, and start with a letter or digit"
            )
        check_collection_name(self.name)


def check_collection_name(name: str) -> None:
    """Raises ``InvalidRequestError`` unless ``name`` can name a collection."""
    if not _COLLECTION_NAME.fullmatch(name):
        raise InvalidRequestError(
            "collection", "must be letters, digits, _, . and -, at most 64, and start with a letter or digit"
        )


def check_document_id(document_id: str) -> None:
    """Raises ``InvalidRequestError`` unless ``document_id`` can name a document."""
    if is_blank(document_id):
        raise InvalidRequestError("document_id", "must not be empty")
    if len(document_id) > MAX_DOCUMENT_ID_CHARS:
        raise InvalidRequestError("document_id", f"must have at most {MAX_DOCUMENT_ID_CHARS} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in document_id):
        raise InvalidRequestError("document_id", "must not hold control characters")
    check_normalised("document_id", document_id)


def check_normalised(field: str, text: str) -> None:
    """Refuses what the gateway writes in another way: it would be stored, and never be found.

    Raises ``InvalidRequestError(field, …)``.
    """
    if normalise(text) != text:
        raise InvalidRequestError(
            field,
            "must be NFC, without soft hyphens and zero-width spaces, as the gateway sends it",
        )


def passage_id(collection: CollectionId, document_id: str, version: str, ordinal: int) -> str:
    """A passage's id, a UUID. Staging the same passage again gives the same id, so nothing is stored twice."""
    name = json.dumps([collection.tenant, collection.name, document_id, version, ordinal])
    return str(uuid.uuid5(_PASSAGE_NAMESPACE, name))


def page_token_after(collection: str, document_id: str) -> str:
    """The token of the page that follows a document."""
    return base64.urlsafe_b64encode(json.dumps([collection, document_id]).encode()).decode()


def read_page_token(token: str, collection: str) -> str:
    """The document that the page follows; empty for the first page. Raises ``InvalidRequestError``."""
    if not token:
        return ""
    try:
        of_collection, document_id = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise InvalidRequestError("page_token", "is none that this server gave") from None
    if of_collection != collection or not isinstance(document_id, str):
        raise InvalidRequestError("page_token", "belongs to another collection")
    check_document_id(document_id)
    return document_id
