"""Requests that no client of good will sends, some hundreds of them: each is refused, and nothing suffers by it."""

from __future__ import annotations

from itertools import pairwise

from tests.integration.conftest import Cluster
from tests.system.hostile import attack, replicas

_MOST_GROWTH_MIB = 24
"""Of a process in so few requests, each time that they are sent."""


async def test_hostile_requests_are_refused_and_nothing_dies_or_grows(cluster: Cluster) -> None:
    # What is loaded, remembered and copied on its first write (workers are forks of one process) is so once,
    # what leaks does so each time: a process's growth is the least of two rounds.
    await attack(cluster.system, 10, seed=1)
    seen = [replicas(cluster.system)]
    for seed in (2, 3):
        report = await attack(cluster.system, 24, seed=seed)
        assert report.bad == []
        assert report.requests == 9 * 24
        seen.append(replicas(cluster.system))
    processes = [{name: pid for name, (pid, _) in each.items()} for each in seen]
    assert processes[1:] == processes[:1] * 2
    grown = {name: [round(after[name][1] - before[name][1]) for before, after in pairwise(seen)] for name in seen[0]}
    assert max(map(min, grown.values())) < _MOST_GROWTH_MIB, grown
