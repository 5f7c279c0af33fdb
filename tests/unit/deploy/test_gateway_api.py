"""Routes of the Gateway API: what is public, and the header that callers need not send."""

from __future__ import annotations

from typing import Any

import yaml

from blockrag.services import SERVICES
from tests.unit.deploy.files import KUBERNETES

ROUTES: dict[str, dict[str, Any]] = {
    route["kind"]: route
    for route in yaml.safe_load_all(
        (KUBERNETES / "components" / "gateway-api" / "routes.yaml").read_text(encoding="utf-8")
    )
}
GATEWAY = next(service for service in SERVICES if service.name == "gateway")


def services_of(rule: dict[str, Any]) -> set[str]:
    return {match["method"]["service"] for match in rule["matches"]}


def test_the_gateway_s_services_are_public_and_no_others() -> None:
    routed = {name for rule in ROUTES["GRPCRoute"]["spec"]["rules"] for name in services_of(rule)}

    assert {name.removeprefix("blockrag.v1.") for name in routed if name.startswith("blockrag.")} == set(
        GATEWAY.protobuf
    )


def test_the_route_says_which_application_is_asked() -> None:
    (ours,) = (
        rule for rule in ROUTES["GRPCRoute"]["spec"]["rules"] if any("blockrag" in name for name in services_of(rule))
    )
    (header,) = ours["filters"][0]["requestHeaderModifier"]["set"]

    assert header == {"name": "application", "value": GATEWAY.name}


def test_listeners_are_two_and_ports_are_the_system_s() -> None:
    """A listener takes routes of one kind only where their host names meet."""
    sections = {kind: route["spec"]["parentRefs"][0]["sectionName"] for kind, route in ROUTES.items()}
    assert sections == {"GRPCRoute": "grpc", "HTTPRoute": "http"}

    (service,) = (
        document
        for document in yaml.safe_load_all((KUBERNETES / "base" / "rayservice.yaml").read_text(encoding="utf-8"))
        if document["kind"] == "RayService"
    )
    ports = {port["name"]: port["port"] for port in service["spec"]["serveService"]["spec"]["ports"]}
    for kind, name in (("GRPCRoute", "serve-grpc"), ("HTTPRoute", "serve")):
        for rule in ROUTES[kind]["spec"]["rules"]:
            assert rule["backendRefs"] == [{"name": "blockrag", "port": ports[name]}]
