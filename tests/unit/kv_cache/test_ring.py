from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.kv_cache.ring import HashRing, shard_names

KEYS = [f"{number:040x}" for number in range(4000)]


@pytest.mark.parametrize("shards", [2, 3, 8, 16])
def test_shards_share_the_keys_about_equally(shards: int) -> None:
    ring = HashRing(shard_names(shards))
    counts = Counter(ring.index(key) for key in KEYS)
    mean = len(KEYS) / shards
    assert len(counts) == shards
    assert 0.6 * mean < min(counts.values())
    assert max(counts.values()) < 1.5 * mean


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.lists(st.text(max_size=20), min_size=1, max_size=200))
def test_a_new_shard_takes_keys_and_moves_no_other(shards: int, keys: list[str]) -> None:
    before, after = HashRing(shard_names(shards)), HashRing(shard_names(shards + 1))
    for key in keys:
        assert after.index(key) in (before.index(key), shards)


def test_a_new_shard_takes_about_its_share() -> None:
    before, after = HashRing(shard_names(4)), HashRing(shard_names(5))
    moved = sum(before.index(key) != after.index(key) for key in KEYS)
    assert 0.12 < moved / len(KEYS) < 0.28


def test_the_order_of_the_nodes_does_not_matter() -> None:
    names = shard_names(5)
    forward, backward = HashRing(names), HashRing(names[::-1])
    assert all(forward.node(key) == backward.node(key) for key in KEYS[:200])


def test_other_processes_agree() -> None:
    program = (
        "from blockrag.kv_cache.ring import HashRing, shard_names\n"
        "ring = HashRing(shard_names(7))\n"
        "print([ring.index(f'{n:040x}') for n in range(50)])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    ring = HashRing(shard_names(7))
    assert answers == {f"{[ring.index(key) for key in KEYS[:50]]}\n"}


@pytest.mark.parametrize("nodes", [[], ["a", "a"]])
def test_impossible_rings_are_refused(nodes: list[str]) -> None:
    with pytest.raises(ValueError, match="node"):
        HashRing(nodes)
