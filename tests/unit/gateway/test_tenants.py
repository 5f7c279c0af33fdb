"""Who asks."""

from __future__ import annotations

import pytest

from blockrag.errors import UnauthenticatedError
from blockrag.gateway.tenants import Tenants
from blockrag.settings import TenantSettings

TENANTS = Tenants(
    [
        TenantSettings(name="acme", api_key="acme-key-0123456789"),
        TenantSettings(name="umbrella", api_key="umbrella-key-0123456789"),
    ]
)


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
