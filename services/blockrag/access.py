"""Who may call: the tenant of a call from outside, from its credentials.

Every service can be called alone over gRPC, so each checks for itself: ``translate_errors`` does it for all RPC
methods of a process that called ``protect``. Calls between services come through handles and are not asked.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any, Protocol
from urllib.parse import unquote

from blockrag.errors import InvalidRequestError, UnauthenticatedError
from blockrag.limits import LOOPBACK_NAMES
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


class CallOrigin(Protocol):
    """The part of Serve's gRPC context that is used here."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...

    def peer(self) -> str: ...


_tenants = Tenants(())
_this_machine_only = False


def protect(settings: Settings) -> None:
    """Has this process's RPC methods ask for the tenants' keys; without tenants nobody is asked.

    With ``cluster.host`` on loopback, calls from other machines are refused: Serve's replicas bind their own gRPC
    ports on all addresses, whatever the host is.
    """
    global _tenants, _this_machine_only
    _tenants = Tenants(settings.gateway.tenants)
    _this_machine_only = settings.cluster.host in LOOPBACK_NAMES


def check_call(request: Any, call: CallOrigin) -> None:
    """Refuses a call from outside without a known key, or with one that is not the tenant's the request speaks for."""
    if _this_machine_only and not is_this_machine(call.peer()):
        raise UnauthenticatedError("this system serves its own machine only: set cluster.host and give tenants keys")
    if not _tenants:
        return
    tenant = _tenants.identify(call.invocation_metadata())
    descriptor = getattr(request, "DESCRIPTOR", None)
    if descriptor is not None and "context" in descriptor.fields_by_name and request.context.tenant != tenant:
        raise InvalidRequestError("context.tenant", f"must be {tenant!r}, whose API key this is")


def is_this_machine(peer: str) -> bool:
    """Whether gRPC's name of a caller (``ipv4:127.0.0.1:5000``, ``ipv6:[::1]:5000``, ``unix:…``) is of this machine."""
    kind, _, place = unquote(peer).partition(":")
    if kind in ("unix", "unix-abstract"):
        return True
    host = place.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or _can_bind(str(address), address.version)


@functools.lru_cache(maxsize=1024)
def _can_bind(address: str, version: int) -> bool:
    # An address that a socket can be bound to is one of this machine's own.
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
