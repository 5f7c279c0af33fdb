"""The longer form of tests/integration/test_hostile.py; the longest is ``python -m tests.system.hostile``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockrag.local import LocalSystem
from tests.system.faults import fault_settings
from tests.system.hostile import attack, replicas


@pytest.mark.own_cluster
@pytest.mark.timeout(900)
def test_hundreds_of_hostile_requests_to_each_service(small_bundle: Path, tmp_path: Path) -> None:
    with LocalSystem.start(fault_settings(tmp_path / "state", str(small_bundle)), owned=True) as system:
        asyncio.run(attack(system, 300, seed=1))
        before = replicas(system)
        report = asyncio.run(attack(system, 300, seed=2))
        assert report.bad == []
        after = replicas(system)
    assert {name: pid for name, (pid, _) in after.items()} == {name: pid for name, (pid, _) in before.items()}
    assert max(after[name][1] - mib for name, (_, mib) in before.items()) < 48
