"""What must hold on this machine before anything is started, and ports that are free on it."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import socket
from pathlib import Path

from blockrag.errors import EnvironmentSetupError
from blockrag.limits import LOOPBACK_NAMES, STORE_HEADROOM
from blockrag.local.state import read_state
from blockrag.settings import Settings

SHARED_MEMORY = Path("/dev/shm")
BLOCK = 64
"""Ports of a block: more than the replicas that one machine's system has."""
# Below the ports that Linux hands out to clients (32768 and up), so that a free block stays free.
_FIRST, _LAST = 20_000, 32_000
_ATTEMPTS = 200
_FREE_PORTS = (10_000, 20_000)


def check_machine(settings: Settings) -> None:
    """Raises ``EnvironmentSetupError``, naming the setting to change, when the system cannot run here.

    Raises ModuleNotFoundError where the client alone is installed.
    """
    _check_installed()
    _check_not_running(settings)
    check_exposure(settings)
    check_memory(settings)
    check_disk(settings)
    cluster = settings.cluster
    check_port(cluster.host, cluster.grpc_port, "cluster.grpc_port")
    check_port(cluster.host, cluster.http_port, "cluster.http_port")


def check_port(host: str, port: int, setting: str) -> None:
    """Raises ``EnvironmentSetupError`` when the port cannot be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are only closing down is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentSetupError(
                f"port {port} on {host} cannot be used ({error.strerror}): free it or change {setting}"
            ) from error


def free_port() -> int:
    """A port that was free a moment ago, outside of those that Linux hands out to clients and Ray to its agents."""
    while not _is_free(port := random.randrange(*_FREE_PORTS)):
        pass
    return port


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


def _check_installed() -> None:
    for name in ("ray", "torch"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _check_not_running(settings: Settings) -> None:
    state = read_state(settings.state_path)
    if state is not None and state.alive:
        raise EnvironmentSetupError(
            f"blockrag is already {'starting' if state.phase == 'starting' else 'running'} at {state.target} "
            f"(process {state.pid}): use it, stop it with 'blockrag down', or set another cluster.state_dir"
        )
    address = os.environ.get("RAY_ADDRESS")
    if address:
        raise EnvironmentSetupError(
            f"RAY_ADDRESS={address} points to a Ray that is already running; 'blockrag up' starts one of its own. "
            "Unset RAY_ADDRESS, or deploy to that cluster with 'serve deploy cluster/cluster.yaml'"
        )


def check_exposure(settings: Settings) -> None:
    """Raises ``EnvironmentSetupError`` when others could reach a system without keys."""
    loopback = settings.cluster.host in LOOPBACK_NAMES
    if not loopback and not settings.gateway.asks_for_keys:
        raise EnvironmentSetupError(
            f"cluster.host is {settings.cluster.host}, which others can reach, and gateway.tenants is empty: "
            "keep cluster.host on loopback or give tenants keys"
        )


def check_memory(settings: Settings) -> None:
    """Raises ``EnvironmentSetupError`` when the object store is too small for the cache or too large to be had."""
    store_mb, budget_mb = settings.cluster.object_store_mb, settings.kv_cache.budget_mb
    if store_mb < budget_mb * STORE_HEADROOM:
        raise EnvironmentSetupError(
            f"cluster.object_store_mb is {store_mb}, less than {STORE_HEADROOM} times kv_cache.budget_mb "
            f"({budget_mb}): blocks would be spilled to disk; raise the one or lower the other"
        )
    free_mb = shutil.disk_usage(SHARED_MEMORY).free // 2**20
    if free_mb < store_mb:
        raise EnvironmentSetupError(
            f"{SHARED_MEMORY} has {free_mb} MiB free and cluster.object_store_mb asks for {store_mb}: enlarge it "
            f"(docker run --shm-size {store_mb + 256}m) or lower cluster.object_store_mb and kv_cache.budget_mb"
        )


def check_disk(settings: Settings) -> None:
    """Raises ``EnvironmentSetupError`` when the disk is smaller than what may be kept on it."""
    path = settings.disk_path
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    disk_mb = shutil.disk_usage(existing).total // 2**20
    if settings.kv_cache.disk_mb > disk_mb:
        raise EnvironmentSetupError(
            f"kv_cache.disk_mb is {settings.kv_cache.disk_mb}, and the disk of {existing} has {disk_mb} MiB in all: "
            "lower it, or set kv_cache.disk_path to a larger disk"
        )
