from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.kv_cache.shards import ShardGroup, owner, shard_names

KEYS = [f"{number:040x}" for number in range(4000)]


@pytest.mark.parametrize("shards", [2, 3, 8, 16])
def test_shards_share_the_keys_about_equally(shards: int) -> None:
    counts = Counter(owner(key, shard_names(shards)) for key in KEYS)
    mean = len(KEYS) / shards
    assert len(counts) == shards
    assert 0.8 * mean < min(counts.values())
    assert max(counts.values()) < 1.2 * mean


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.lists(st.text(max_size=20), min_size=1, max_size=200))
def test_a_new_shard_takes_keys_and_moves_no_other(shards: int, keys: list[str]) -> None:
    for key in keys:
        assert owner(key, shard_names(shards + 1)) in (owner(key, shard_names(shards)), shards)


def test_a_new_shard_takes_about_its_share() -> None:
    moved = sum(owner(key, shard_names(4)) != owner(key, shard_names(5)) for key in KEYS)
    assert 0.17 < moved / len(KEYS) < 0.23


def test_the_order_of_the_names_does_not_matter() -> None:
    names = shard_names(5)
    for key in KEYS[:200]:
        assert names[owner(key, names)] == names[::-1][owner(key, names[::-1])]


def test_other_processes_agree() -> None:
    program = (
        "from blockrag.kv_cache.shards import owner, shard_names\n"
        "print([owner(f'{n:040x}', shard_names(7)) for n in range(50)])"
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
    assert answers == {f"{[owner(key, shard_names(7)) for key in KEYS[:50]]}\n"}


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a"], ["a", "b", "c"]])
def test_names_that_do_not_fit_the_shards_are_refused(names: list[str]) -> None:
    shards: list[Any] = [None] * (2 if names else 0)
    with pytest.raises(ValueError, match=f"{len(shards)} shards"):
        ShardGroup(shards, names)
