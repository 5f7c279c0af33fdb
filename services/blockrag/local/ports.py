"""Ports for Serve's replicas on this machine."""

from __future__ import annotations

import random
import socket

from blockrag.errors import EnvironmentSetupError

BLOCK = 64
"""Ports of a block: more than the replicas that one machine's system has."""
# Below the ports that Linux hands out to clients (32768 and up), so that a free block stays free.
_FIRST, _LAST = 20_000, 32_000
_ATTEMPTS = 200


def serve_port_environment() -> dict[str, str]:
    """Ports for Serve's replicas and fallback proxy that are free on this machine.

    Serve has fixed ones, and its gRPC servers share a port with whoever has it already: Ray 2.60 switches
    ``SO_REUSEPORT`` off with a string where gRPC takes a number only. So two systems on one machine would answer
    each other's requests (seen: by way of the fallback proxy, until HAProxy trusts a new replica).
    """
    http, grpc = free_block(), free_block()
    while abs(http - grpc) < BLOCK:
        grpc = free_block()
    last = BLOCK - 1
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http + last),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http + last),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc + last),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc + last),
    }


def free_block() -> int:
    """First of ``BLOCK`` ports that nobody listened on a moment ago; ``EnvironmentSetupError`` when there are none."""
    for _ in range(_ATTEMPTS):
        first = random.randrange(_FIRST, _LAST - BLOCK)
        if all(_is_free(port) for port in range(first, first + BLOCK)):
            return first
    raise EnvironmentSetupError(f"no {BLOCK} free ports in a row between {_FIRST} and {_LAST} for Serve's replicas")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
