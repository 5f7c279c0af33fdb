"""Who asks."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from blockrag.access import Tenants, check_call, is_this_machine, protect
from blockrag.errors import InvalidRequestError, UnauthenticatedError
from blockrag.settings import ClusterSettings, GatewaySettings, Settings, TenantSettings
from blockrag.v1.common_pb2 import RequestContext
from blockrag.v1.decoder_pb2 import GetDecoderStatusRequest
from blockrag.v1.retriever_pb2 import SearchRequest

ACME = TenantSettings(name="acme", api_key="acme-key-0123456789")
TENANTS = Tenants([ACME, TenantSettings(name="umbrella", api_key="umbrella-key-0123456789")])


def test_without_tenants_everybody_is_public() -> None:
    assert Tenants([]).identify([]) == "public"
    assert Tenants([]).identify([("authorization", "Bearer whatever")]) == "public"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_proves_its_tenant(scheme: str) -> None:
    assert TENANTS.identify([("authorization", f"{scheme} acme-key-0123456789")]) == "acme"
    assert TENANTS.identify([("authorization", f"{scheme} umbrella-key-0123456789 ")]) == "umbrella"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "acme-key-0123456789")],
        [("authorization", "Basic acme-key-0123456789")],
        [("authorization", "Bearer acme-key-012345678")],
        [("authorization", "Bearer ACME-KEY-0123456789")],
        [("authorization", b"\xff\xfe")],
        [("tenant", "acme")],
    ],
)
def test_anything_else_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        TENANTS.identify(metadata)
    assert "acme-key" not in str(refused.value)


class Call:
    """Where a call comes from."""

    def __init__(self, *metadata: tuple[str, str], peer: str = "ipv4:127.0.0.1:5000") -> None:
        self._metadata = metadata
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


@pytest.fixture
def protected() -> Iterator[None]:
    protect(Settings(gateway=GatewaySettings(tenants=(ACME,))))
    yield
    protect(ANYWHERE)


ANYWHERE = Settings(cluster=ClusterSettings(host="0.0.0.0"))
ELSEWHERE = "ipv4:203.0.113.7:5000"
KEY = ("authorization", "Bearer acme-key-0123456789")


@pytest.mark.usefixtures("protected")
def test_a_service_called_alone_serves_a_keys_own_tenant_only() -> None:
    own = SearchRequest(context=RequestContext(tenant="acme"))
    check_call(own, Call(KEY))
    check_call(GetDecoderStatusRequest(), Call(KEY))
    with pytest.raises(UnauthenticatedError):
        check_call(own, Call())
    with pytest.raises(UnauthenticatedError):
        check_call(GetDecoderStatusRequest(), Call())
    for tenant in ("umbrella", ""):
        with pytest.raises(InvalidRequestError, match=r"context\.tenant"):
            check_call(SearchRequest(context=RequestContext(tenant=tenant)), Call(KEY))


def test_without_tenants_nobody_is_asked() -> None:
    protect(ANYWHERE)
    check_call(SearchRequest(context=RequestContext(tenant="anybody")), Call(peer=ELSEWHERE))


def test_a_system_on_loopback_serves_its_own_machine_only() -> None:
    protect(Settings())
    check_call(GetDecoderStatusRequest(), Call())
    with pytest.raises(UnauthenticatedError, match="own machine"):
        check_call(GetDecoderStatusRequest(), Call(peer=ELSEWHERE))
    protect(ANYWHERE)


@pytest.mark.parametrize(
    ("peer", "own"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.8.9.10:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::ffff:127.0.0.1]:5000", True),
        ("unix:/tmp/socket", True),
        ("ipv4:203.0.113.7:5000", False),
        ("ipv6:[2001:db8::7]:5000", False),
        ("ipv6:[::ffff:203.0.113.7]:5000", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_which_callers_are_this_machines(peer: str, own: bool) -> None:
    assert is_this_machine(peer) == own


def test_every_address_of_this_machine_counts() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.7", 9))  # sends nothing: asks which address would be used
        address = probe.getsockname()[0]
    assert is_this_machine(f"ipv4:{address}:5000")
