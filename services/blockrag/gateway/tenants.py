"""Who asks: the tenant of a call, from its credentials."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from blockrag.errors import UnauthenticatedError
from blockrag.settings import TenantSettings

PUBLIC_TENANT = "public"
_SCHEME = "bearer "


class Tenants:
    """The tenants that have keys. Without any, everybody is the tenant ``public``."""

    def __init__(self, tenants: Sequence[TenantSettings]) -> None:
        self._tenants = tuple((_digest(tenant.api_key), tenant.name) for tenant in tenants)

    def identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The tenant that a call's metadata proves; ``UnauthenticatedError`` for a missing or wrong key."""
        if not self._tenants:
            return PUBLIC_TENANT
        credentials = [value for key, value in metadata if key.lower() == "authorization"]
        if not credentials:
            raise UnauthenticatedError("metadata 'authorization: Bearer <api key>' is missing")
        header = credentials[0]
        text = header.decode("utf-8", "replace") if isinstance(header, bytes) else header
        if not text.lower().startswith(_SCHEME):
            raise UnauthenticatedError("metadata 'authorization' must be 'Bearer <api key>'")
        given = _digest(text[len(_SCHEME) :].strip())
        found = ""
        # Every key is compared, each in constant time: the time taken says nothing about any of them.
        for digest, name in self._tenants:
            if hmac.compare_digest(digest, given):
                found = name
        if not found:
            raise UnauthenticatedError("the API key is not known")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
