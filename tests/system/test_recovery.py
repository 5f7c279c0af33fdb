"""Every part of a running system is killed once under load: nothing fails, nothing is wrong, all of it comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockrag.local import LocalSystem
from tests.system.faults import TARGETS, fault_settings, measure, processes


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
