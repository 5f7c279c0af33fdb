"""Who may call: the tenant of a call from outside, from its credentials.

Every service can be called alone over gRPC, so each checks for itself: ``rpc`` does it for every RPC method, by the
``access`` of the replica. Calls between services come through handles and are not asked.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from google.protobuf.message import Message

from blockrag.errors import InvalidRequestError, SettingsError, UnauthenticatedError
from blockrag.limits import LOOPBACK_NAMES
from blockrag.settings import Settings
from blockrag.tenants import (
    HASHED_KEY,
    NO_LIMITS,
    TenantLimits,
    TenantSettings,
    check_distinct,
    key_digest,
    read_tenants,
)

PUBLIC_TENANT = "public"
_SCHEME = "bearer "
_ADDRESSES_KEPT_S = 60
_FILE_KEPT_S = 2.0
"""How long the file of tenants is not looked at again."""

_logger = logging.getLogger(__name__)


Status = TypeVar("Status", bound=Message)


@dataclass(frozen=True)
class Caller:
    """Who calls, as the credentials prove."""

    tenant: str
    operator: bool = False
    """Whether it sees what belongs to others: what a status or a trace lists."""


THE_SYSTEM = Caller(PUBLIC_TENANT, operator=True)
"""Who calls through a deployment's handle: a process of the system itself."""


@dataclass(frozen=True)
class OnBehalf:
    """In the place of Serve's gRPC context, where another door of the system passes on a call that it has admitted.

    It goes through a deployment's handle, so only a process of the system can send one.
    """

    caller: Caller
    metadata: tuple[tuple[str, str], ...] = ()
    """What the call's client sent: ``request_id``, ``traceparent``."""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """As Serve's context has it."""
        return self.metadata

    def trailing_metadata(self) -> Sequence[tuple[str, str]]:
        """None: errors pass through a handle as they are."""
        return ()


@dataclass(frozen=True)
class _Known:
    """What is known of some tenants."""

    keys: tuple[tuple[bytes, Caller], ...]
    """Digest and tenant of every key."""
    limits: Mapping[str, TenantLimits]

    @classmethod
    def of(cls, tenants: Sequence[TenantSettings]) -> _Known:
        callers = {tenant: Caller(tenant.name, tenant.operator) for tenant in tenants}
        keys = tuple((key_digest(key), caller) for tenant, caller in callers.items() for key in tenant.keys)
        return cls(keys, {tenant.name: tenant.limits for tenant in tenants})


class Tenants:
    """The tenants that have keys. Without any, everybody is the tenant ``public``, and its own operator."""

    def __init__(self, tenants: Sequence[TenantSettings], file: Path | None = None) -> None:
        """``file`` has more of them and is read again when it changes; what cannot be read then leaves those known
        before. Raises SettingsError when it cannot be read now."""
        self._named = tuple(tenants)
        self._fixed = _Known.of(tenants)
        self._file = file
        self._version = _file_version(file) if file is not None else None
        self._of_file = self._read(file) if file is not None else _Known.of(())
        self._look_again = time.monotonic() + _FILE_KEPT_S

    def __bool__(self) -> bool:
        return bool(self._fixed.keys) or self._file is not None

    def limits(self, tenant: str) -> TenantLimits:
        """What a tenant may have and do, as settings and file say now."""
        self._read_again()
        return self._fixed.limits.get(tenant) or self._of_file.limits.get(tenant) or NO_LIMITS

    def names(self) -> tuple[str, ...]:
        """All of their names; without keys ``public``."""
        self._read_again()
        return (*self._fixed.limits, *self._of_file.limits) if self else (PUBLIC_TENANT,)

    def identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """The caller that a call's metadata proves; ``UnauthenticatedError`` for a missing or wrong key."""
        if not self:
            return THE_SYSTEM
        self._read_again()
        credentials = [value for key, value in metadata if key.lower() == "authorization"]
        if not credentials:
            raise UnauthenticatedError("metadata 'authorization: Bearer <api key>' is missing")
        header = credentials[0]
        text = header.decode("utf-8", "replace") if isinstance(header, bytes) else header
        if not text.lower().startswith(_SCHEME):
            raise UnauthenticatedError("metadata 'authorization' must be 'Bearer <api key>'")
        given = hashlib.sha256(text[len(_SCHEME) :].strip().encode()).digest()
        found = None
        # Every key is compared, each in constant time: the time taken says nothing about any of them.
        for digest, caller in (*self._fixed.keys, *self._of_file.keys):
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None:
            raise UnauthenticatedError("the API key is not known")
        return found

    def _read_again(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._look_again:
            return
        self._look_again = now + _FILE_KEPT_S
        version = _file_version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._of_file = self._read(self._file)
        except SettingsError as error:
            _logger.error("the tenants known before stay: %s", error)
        else:
            _logger.info("%s was read again: %d keys", self._file, len(self._of_file.keys))

    def _read(self, file: Path) -> _Known:
        found = read_tenants(file)
        try:
            check_distinct((*self._named, *found))
        except ValueError as error:
            raise SettingsError(f"gateway.tenants_file {file}: {error}") from error
        return _Known.of(found)


_DESCRIBING = {
    "GetRetrieverStatusResponse": ("backend", "embedding_model", "dimensions", "tenants"),
    "GetEncoderStatusResponse": ("bundle_fingerprint", "device", "compute_dtype"),
    "GetKvCacheStatusResponse": ("budget_bytes", "shards", "tenants"),
    "GetDecoderStatusResponse": (
        *("bundle_fingerprint", "bundle_name", "max_positions", "device", "compute_dtype", "weights"),
        *("total_slots", "l1_budget_bytes"),
    ),
}
"""Of each service's status, what describes it. The rest counts what all tenants do or have."""


def show_own(status: Status, caller: Caller) -> Status:
    """The status of a service, of which in place is left what the caller may see.

    An operator sees everything, a tenant what describes the service and its own row of ``tenants``. Sums that a row
    has too, like ``passages``, are its own then.
    """
    if caller.operator:
        return status
    shown = _DESCRIBING[status.DESCRIPTOR.name]
    for field, _ in status.ListFields():
        if field.name not in shown:
            status.ClearField(field.name)
    rows = getattr(status, "tenants", [])
    show_own_rows(rows, caller)
    for row in rows:
        for field, value in row.ListFields():
            if field.name in status.DESCRIPTOR.fields_by_name:
                setattr(status, field.name, value)
    return status


def show_own_rows(rows: MutableSequence[Any], caller: Caller) -> None:
    """Take other tenants' rows of a status away, in place, unless the caller is an operator."""
    for place in reversed(range(len(rows))):
        if not caller.operator and rows[place].tenant != caller.tenant:
            del rows[place]


class Access(Tenants):
    """Who may call the RPC methods of a replica. A replica that has none is called by nobody (``rpc``)."""

    def __init__(self, settings: Settings) -> None:
        """With tenants a key is asked for. With ``cluster.host`` on loopback, calls from other machines are refused:
        Serve's replicas bind their own gRPC ports on all addresses, whatever the host is."""
        file = settings.gateway.tenants_file
        super().__init__(settings.gateway.tenants, Path(file).expanduser() if file else None)
        self._this_machine_only = settings.cluster.host in LOOPBACK_NAMES

    def check(self, request: Any, call: Any) -> Caller:
        """Who calls, by Serve's gRPC context; refuses one without a known key, or with that of another tenant."""
        if self._this_machine_only and not is_this_machine(call.peer()):
            raise UnauthenticatedError(
                "this system serves its own machine only: set cluster.host and give tenants keys"
            )
        caller = self.identify(call.invocation_metadata())
        if self:
            descriptor = getattr(request, "DESCRIPTOR", None)
            speaks = descriptor is not None and "context" in descriptor.fields_by_name
            if speaks and request.context.tenant != caller.tenant:
                raise InvalidRequestError("context.tenant", f"must be {caller.tenant!r}, whose API key this is")
        return caller


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
    return address.is_loopback or address in own_addresses()


def own_addresses(proc: Path = Path("/proc")) -> frozenset[IPv4Address | IPv6Address]:
    """Addresses of this machine's interfaces, as the kernel lists them; none where it lists none.

    That a socket could be bound to an address proves nothing: with ``net.ipv4.ip_nonlocal_bind`` it can be to any.
    """
    return _addresses(proc, int(time.monotonic() // _ADDRESSES_KEPT_S))


@functools.lru_cache(maxsize=4)
def _addresses(proc: Path, period: int) -> frozenset[IPv4Address | IPv6Address]:
    found: set[IPv4Address | IPv6Address] = set()
    with contextlib.suppress(OSError):
        lines = (proc / "net" / "fib_trie").read_text(encoding="ascii").splitlines()
        for line, following in itertools.pairwise(lines):
            if following.strip() == "/32 host LOCAL":
                found.add(IPv4Address(line.strip().removeprefix("|-- ")))
    with contextlib.suppress(OSError):
        for line in (proc / "net" / "if_inet6").read_text(encoding="ascii").splitlines():
            found.add(IPv6Address(int(line.split()[0], 16)))
    return frozenset(found)


def hashed_key(key: str) -> str:
    """How settings may name a key without giving it away. A key is random and long, so one round of a hash is enough:
    there is nothing to guess."""
    return HASHED_KEY + hashlib.sha256(key.encode()).hexdigest()


def _file_version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
