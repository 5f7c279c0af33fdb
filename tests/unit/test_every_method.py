"""Methods and routes that are tried across tenants: all of them. One that is added needs a case of its own."""

from __future__ import annotations

from blockrag.http.app import build_app
from blockrag.settings import Settings
from tests.system.foreign import CASES, HTTP_CASES, UNGUARDED_PATHS
from tests.system.rpcs import all_rpcs
from tests.unit.http.standin import StandIn


def test_every_rpc_has_a_case_across_tenants() -> None:
    assert {f"{rpc.service}/{rpc.method}" for rpc in all_rpcs()} == set(CASES)


def test_every_route_has_a_case_across_tenants() -> None:
    paths = build_app(StandIn(), Settings()).openapi()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert routes - UNGUARDED_PATHS == set(HTTP_CASES)
