"""Page tokens of document listings: where the next page starts."""

from __future__ import annotations

import base64
import binascii
import json

from blockrag.errors import InvalidRequestError


def page_token_after(collection: str, document_id: str) -> str:
    """The token of the page that follows a document."""
    return base64.urlsafe_b64encode(json.dumps([collection, document_id]).encode()).decode()


def read_page_token(token: str, collection: str) -> str:
    """The document that the page follows; empty for the first page. Raises ``InvalidRequestError``."""
    if not token:
        return ""
    try:
        of_collection, document_id = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError):
        raise InvalidRequestError("page_token", "is none that this server gave") from None
    if of_collection != collection or not isinstance(document_id, str):
        raise InvalidRequestError("page_token", "belongs to another collection")
    return document_id
