"""Who asks."""

from __future__ import annotations

import logging
import socket
import time
from ipaddress import ip_address
from pathlib import Path

import pytest

from blockrag.access import THE_SYSTEM, Access, Caller, Tenants, hashed_key, is_this_machine, own_addresses
from blockrag.errors import InvalidRequestError, SettingsError, UnauthenticatedError
from blockrag.settings import ClusterSettings, GatewaySettings, KvCacheSettings, Settings
from blockrag.tenants import NO_LIMITS, TenantLimits, TenantSettings
from blockrag.v1.common_pb2 import RequestContext
from blockrag.v1.decoder_pb2 import GetDecoderStatusRequest
from blockrag.v1.retriever_pb2 import SearchRequest

ACME = TenantSettings(name="acme", api_key="acme-key-0123456789")
TENANTS = Tenants([ACME, TenantSettings(name="umbrella", api_key="umbrella-key-0123456789", operator=True)])


def test_without_tenants_everybody_is_public() -> None:
    assert Tenants([]).identify([]) == THE_SYSTEM == Caller("public", operator=True)
    assert Tenants([]).identify([("authorization", "Bearer whatever")]) == THE_SYSTEM


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_proves_its_tenant(scheme: str) -> None:
    assert TENANTS.identify([("authorization", f"{scheme} acme-key-0123456789")]) == Caller("acme")
    assert TENANTS.identify([("authorization", f"{scheme} umbrella-key-0123456789 ")]) == Caller(
        "umbrella", operator=True
    )


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


def test_limits_are_those_of_settings_and_file_as_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tenants.yaml"
    line = "- {name: umbrella, api_key: umbrella-key-0123456789, limits: {documents: %d}}"
    file.write_text(line % 5)
    fixed = TenantSettings(name="acme", api_key="acme-key-0123456789", limits=TenantLimits(questions=2))
    tenants = Tenants([fixed], file)
    assert tenants.names() == ("acme", "umbrella")
    assert tenants.limits("acme") == TenantLimits(questions=2)
    assert tenants.limits("umbrella") == TenantLimits(documents=5)
    assert tenants.limits("nobody") == NO_LIMITS
    file.write_text(line % 10)
    later = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert tenants.limits("umbrella") == TenantLimits(documents=10)
    assert Tenants([]).names() == ("public",)


class Call:
    """Where a call comes from."""

    def __init__(self, *metadata: tuple[str, str], peer: str = "ipv4:127.0.0.1:5000") -> None:
        self._metadata = metadata
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


SECRET = KvCacheSettings(secret="not the one that everybody knows")
PROTECTED = Access(Settings(gateway=GatewaySettings(tenants=(ACME,)), kv_cache=SECRET))
ANYWHERE = Settings(cluster=ClusterSettings(host="0.0.0.0"))
ELSEWHERE = "ipv4:203.0.113.7:5000"
KEY = ("authorization", "Bearer acme-key-0123456789")


def test_a_service_called_alone_serves_a_keys_own_tenant_only() -> None:
    own = SearchRequest(context=RequestContext(tenant="acme"))
    assert PROTECTED.check(own, Call(KEY)) == Caller("acme")
    assert PROTECTED.check(GetDecoderStatusRequest(), Call(KEY)) == Caller("acme")
    with pytest.raises(UnauthenticatedError):
        PROTECTED.check(own, Call())
    with pytest.raises(UnauthenticatedError):
        PROTECTED.check(GetDecoderStatusRequest(), Call())
    for tenant in ("umbrella", ""):
        with pytest.raises(InvalidRequestError, match=r"context\.tenant"):
            PROTECTED.check(SearchRequest(context=RequestContext(tenant=tenant)), Call(KEY))


def test_without_tenants_nobody_is_asked() -> None:
    anybody = SearchRequest(context=RequestContext(tenant="anybody"))
    assert Access(ANYWHERE).check(anybody, Call(peer=ELSEWHERE)) == THE_SYSTEM


def test_a_system_on_loopback_serves_its_own_machine_only() -> None:
    Access(Settings()).check(GetDecoderStatusRequest(), Call())
    with pytest.raises(UnauthenticatedError, match="own machine"):
        Access(Settings()).check(GetDecoderStatusRequest(), Call(peer=ELSEWHERE))


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


def test_what_can_be_bound_to_is_not_for_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with net.ipv4.ip_nonlocal_bind=1, which load balancers set."""
    monkeypatch.setattr(socket.socket, "bind", lambda self, address: None)
    assert not is_this_machine(ELSEWHERE)


def test_addresses_are_read_as_the_kernel_lists_them(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "fib_trie").write_text(
        "Local:\n  +-- 10.0.0.0/8 2 0 2\n     |-- 10.0.0.0\n        /8 link UNICAST\n     |-- 10.1.2.3\n"
        "        /32 host LOCAL\n     |-- 10.255.255.255\n        /32 link BROADCAST\n",
        encoding="ascii",
    )
    (tmp_path / "net" / "if_inet6").write_text(
        "fe8000000000000000fc00fffe000001 04 40 20 80     eth0\n", encoding="ascii"
    )
    assert own_addresses(tmp_path) == {ip_address("10.1.2.3"), ip_address("fe80::fc:ff:fe00:1")}
    assert own_addresses(tmp_path / "absent") == frozenset()


def test_keys_are_several_and_may_be_given_by_their_hash() -> None:
    new = "the-new-key-0123456789"
    known = Tenants([TenantSettings(name="acme", api_key=ACME.api_key, api_keys=(hashed_key(new),))])
    for key in (ACME.api_key, new):
        assert known.identify([("authorization", f"Bearer {key}")]) == Caller("acme")
    with pytest.raises(UnauthenticatedError):  # who has read the settings has no key
        known.identify([("authorization", f"Bearer {hashed_key(new)}")])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "api_key or api_keys must be set"),
        ({"api_key": "short"}, "at least 16 characters"),
        ({"api_keys": ("sha256:0123",)}, "64 hexadecimal digits"),
        ({"api_key": "a-key-of-a-block-in-yaml\n"}, "white space around it"),
        ({"api_key": "schlüssel-0123456789"}, "printable ASCII"),
    ],
)
def test_keys_that_are_none(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TenantSettings.model_validate({"name": "acme", **values})


def test_a_key_is_one_tenant_s(tmp_path: Path) -> None:
    """The later one of them would answer for the other."""
    key = "umbrella-key-0123456789"
    for same in (key, hashed_key(key)):
        pair = (TenantSettings(name="acme", api_key=key), TenantSettings(name="umbrella", api_keys=(same,)))
        with pytest.raises(ValueError, match="acme and umbrella have the same key") as refused:
            GatewaySettings(tenants=pair)
        assert key not in str(refused.value.errors(include_input=False))  # type: ignore[attr-defined]
    file = tmp_path / "tenants.yaml"
    file.write_text(f"- {{name: umbrella, api_key: {key}}}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"tenants_file .*: acme and umbrella have the same key"):
        Tenants(pair[:1], file)
    GatewaySettings(tenants=(pair[0], TenantSettings(name="acme", api_key=key, operator=True)))  # nobody else's


def test_a_file_of_tenants_is_read_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("- {name: acme, api_key: acme-key-0123456789}\n", encoding="utf-8")
    known = Tenants([], file)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)

    def admits(key: str) -> bool:
        nonlocal clock
        clock += 10
        try:
            known.identify([("authorization", f"Bearer {key}")])
        except UnauthenticatedError:
            return False
        return True

    assert admits("acme-key-0123456789") and not admits("acme-key-two-0123456789")
    file.write_text("- {name: acme, api_keys: [acme-key-two-0123456789]}\n", encoding="utf-8")
    assert admits("acme-key-two-0123456789") and not admits("acme-key-0123456789")
    file.write_text("- {name: acme, api_key: short}\n", encoding="utf-8")
    with caplog.at_level(logging.ERROR, "blockrag"):
        assert admits("acme-key-two-0123456789")
    assert "at least 16 characters" in caplog.text and "short" not in caplog.text.replace("shortest", "")
    file.unlink()
    assert admits("acme-key-two-0123456789")
    file.write_text("[]\n", encoding="utf-8")
    assert not admits("acme-key-two-0123456789")  # nobody, not everybody


def test_a_file_of_tenants_that_cannot_be_read_at_first_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tenants_file .*none\.yaml"):
        Tenants([], tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"kv_cache\.secret must be set"):
        Settings(gateway=GatewaySettings(tenants_file=str(tmp_path / "none.yaml")))
