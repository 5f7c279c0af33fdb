"""The life of a local system: nothing stays behind, whatever happens to who started it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockrag.errors import EnvironmentSetupError
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.local.state import read_state
from blockrag.settings import BundleSettings, ClusterSettings, KvCacheSettings, Settings

_STARTER = """
import sys, time
from blockrag.local import LocalSystem
from blockrag.settings import load_settings
system = LocalSystem.start(load_settings(sys.argv[1]), owned=True)
print(system.target, flush=True)
time.sleep(600)
"""


@pytest.mark.own_cluster
@pytest.mark.timeout(400)
def test_a_killed_starter_takes_its_system_along_and_nothing_is_started_twice(
    small_bundle: Path, tmp_path: Path
) -> None:
    settings = Settings(
        bundle=BundleSettings(path=str(small_bundle)),
        cluster=ClusterSettings(
            grpc_port=free_port(), http_port=free_port(), object_store_mb=128, state_dir=str(tmp_path)
        ),
        kv_cache=KvCacheSettings(budget_mb=64),
    )
    file = tmp_path / "given.yaml"
    file.write_text(settings.model_dump_json())
    with subprocess.Popen([sys.executable, "-c", _STARTER, str(file)], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline().strip() == f"127.0.0.1:{settings.cluster.grpc_port}"
        state = read_state(tmp_path)
        assert state is not None
        with pytest.raises(EnvironmentSetupError, match="already running"):
            LocalSystem.start(settings)
        assert LocalSystem.attach(settings).target == state.target
        starter.kill()
    deadline = time.monotonic() + 60
    while state.alive and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not state.alive
    stopped = read_state(tmp_path)
    assert stopped is not None
    assert stopped.phase == "stopped"
    assert not _processes_with(str(tmp_path))


@pytest.mark.own_cluster
@pytest.mark.timeout(400)
def test_a_stop_is_graceful_at_any_time_and_leaves_nothing_behind(small_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(
        bundle=BundleSettings(path=str(small_bundle)),
        cluster=ClusterSettings(
            grpc_port=free_port(), http_port=free_port(), object_store_mb=128, state_dir=str(tmp_path / "state")
        ),
        kv_cache=KvCacheSettings(budget_mb=64),
    )
    before = set(Path(tempfile.gettempdir()).glob("*")) | set(Path("/tmp").glob("*"))
    # While it starts: what starts it is told to stop as soon as the applications are under way.
    with pytest.raises(KeyboardInterrupt):
        LocalSystem.start(settings, on_progress=_interrupt_at("starting the applications"))
    _assert_stopped(settings.state_path)
    with LocalSystem.start(settings):
        pass
    _assert_stopped(settings.state_path)
    after = set(Path(tempfile.gettempdir()).glob("*")) | set(Path("/tmp").glob("*"))
    # Ray keeps its sessions' logs in a folder of its own.
    assert {path.name for path in after - before if "blockrag" in path.name or len(path.name) > 40} == set()
    assert not (settings.state_path / "haproxy").exists()


def _interrupt_at(detail: str) -> Callable[[str], None]:
    def progress(reported: str) -> None:
        if reported == detail:
            raise KeyboardInterrupt

    return progress


def _assert_stopped(state_path: Path) -> None:
    stopped = read_state(state_path)
    assert stopped is not None
    assert stopped.phase == "stopped"
    assert not stopped.alive
    assert not _processes_with(str(state_path))


def _processes_with(text: str) -> list[str]:
    """Command lines of running processes that mention a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and folder.name != str(os.getpid()):
            found.append(line)
    return found
