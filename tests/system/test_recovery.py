"""Every part of a running system is killed once under load: nothing fails, nothing is wrong, all of it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.local.state import read_state
from tests.system.faults import COLLECTION, RAY, TARGETS, fault_settings, measure, processes


@pytest.mark.own_cluster
@pytest.mark.timeout(900)
def test_clients_do_not_see_that_a_part_is_killed(small_bundle: Path, tmp_path: Path) -> None:
    settings = fault_settings(tmp_path / "state", str(small_bundle))
    with LocalSystem.start(settings, owned=True) as system:
        outcome = asyncio.run(measure(system, TARGETS, kills=1, settle_s=3.0, per_second=2.0, seed=0))
        assert [fault.target for fault in outcome.faults] == list(TARGETS)
        assert all(processes(system, target) for target in TARGETS)
    assert [(each.kind, each.error, each.wrong) for each in outcome.requests if each.error or each.wrong] == []
    by_target = {fault.target: fault for fault in outcome.faults}
    # Two gateways and two HAProxies: the next connection finds the other one.
    assert by_target["gateway"].away_s < 5
    assert by_target["haproxy"].away_s < 2


def await_state(state_path: Path, detail: str) -> None:
    """Until the system says that it does this; nothing: until it is ready."""
    until = time.monotonic() + 120
    while (state := read_state(state_path)) is None or state.detail != detail:
        assert time.monotonic() < until, state
        time.sleep(0.05)


async def answers(system: LocalSystem) -> None:
    async with BlockragClient(system.target, timeout_s=60, patience_s=60) as client:
        found = await client.retrieve("capital of Peru", collection=COLLECTION, top_k=1)
        assert [passage.title for passage in found] == ["Peru"]


@pytest.mark.own_cluster
@pytest.mark.timeout(900)
def test_everything_starts_anew_where_ray_itself_is_killed(small_bundle: Path, tmp_path: Path) -> None:
    """What was acknowledged is there again, and clients that wait for the time of a start see nothing fail."""
    settings = fault_settings(tmp_path / "state", str(small_bundle))
    with LocalSystem.start(settings, owned=True) as system:
        before = read_state(settings.state_path)
        outcome = asyncio.run(measure(system, RAY, kills=1, settle_s=3.0, per_second=1.0, seed=0, patience_s=120.0))
        assert [fault.target for fault in outcome.faults] == list(RAY)
        state = read_state(settings.state_path)
        assert state is not None and before is not None
        assert (state.pid, state.phase) == (before.pid, "ready")
        assert all(processes(system, target) for target in (*TARGETS, *RAY))
        # Once more, and again while it starts.
        for detail in ("", "starting the applications"):
            await_state(settings.state_path, detail)
            os.kill(processes(system, "raylet")[0], signal.SIGKILL)
        await_state(settings.state_path, "starting the applications")
        await_state(settings.state_path, "")
        asyncio.run(answers(system))
    assert [(each.kind, each.error, each.wrong) for each in outcome.requests if each.error or each.wrong] == []
    assert read_state(settings.state_path).phase == "stopped"  # type: ignore[union-attr]
