"""Requests that no client of good will sends, some hundreds of them: each is refused, and nothing suffers by it."""

from __future__ import annotations

from tests.integration.conftest import Cluster
from tests.system.hostile import attack, replicas

_MOST_GROWTH_MIB = 48
"""Of a process in so few requests: what is loaded and remembered when it is first used."""


async def test_hostile_requests_are_refused_and_nothing_dies_or_grows(cluster: Cluster) -> None:
    await attack(cluster.system, 10, seed=1)
    before = replicas(cluster.system)
    report = await attack(cluster.system, 40, seed=2)
    assert report.bad == []
    assert report.requests == 9 * 40
    after = replicas(cluster.system)
    assert {name: pid for name, (pid, _) in after.items()} == {name: pid for name, (pid, _) in before.items()}
    grown = {name: round(after[name][1] - mib) for name, (_, mib) in before.items()}
    assert max(grown.values()) < _MOST_GROWTH_MIB, grown
