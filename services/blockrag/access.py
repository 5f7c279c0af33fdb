"""Who may call: the tenant of a call from outside, from its credentials.

Every service can be called alone over gRPC, so each checks for itself: ``translate_errors`` does it for all RPC
methods of a process that called ``protect``. Calls between services come through handles and are not asked.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from blockrag.errors import InvalidRequestError, UnauthenticatedError
from blockrag.settings import Settings, TenantSettings

PUBLIC_TENANT = "public"
_SCHEME = "bearer "


class Tenants:
    """The tenants that have keys. Without any, everybody is the tenant ``public``."""

    def __init__(self, tenants: Sequence[TenantSettings]) -> None:
        self._tenants = tuple((_digest(tenant.api_key), tenant.name) for tenant in tenants)

    def __bool__(self) -> bool:
        return bool(self._tenants)

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


class CallMetadata(Protocol):
    """The part of Serve's gRPC context that is used here."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...


_tenants = Tenants(())


def protect(settings: Settings) -> None:
    """Has this process's RPC methods ask for the tenants' keys; without tenants nobody is asked."""
    global _tenants
    _tenants = Tenants(settings.gateway.tenants)


def check_call(request: Any, call: CallMetadata) -> None:
    """Refuses a call from outside without a known key, or with one that is not the tenant's the request speaks for."""
    if not _tenants:
        return
    tenant = _tenants.identify(call.invocation_metadata())
    descriptor = getattr(request, "DESCRIPTOR", None)
    if descriptor is not None and "context" in descriptor.fields_by_name and request.context.tenant != tenant:
        raise InvalidRequestError("context.tenant", f"must be {tenant!r}, whose API key this is")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
