"""The simulation against queueing theory, a cache's approximation, and the tiers that are served."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.kv_cache.shard_messages import DocumentId
from blockrag.kv_cache.store import BlockStore
from blockrag.lru import Lru
from blockrag.simulation.cluster import beside_others, simulate, smallest
from blockrag.simulation.scenario import Scenario, StageTimes, percentile
from blockrag.simulation.workload import Workload

NOTHING = StageTimes(*(0.0 for _ in StageTimes.__dataclass_fields__))
SMALL = Scenario(passages=2_000, questions=4_000, rate=1.0)


def test_one_decoder_is_a_queue_with_constant_service() -> None:
    """Lindley's recursion over the same arrivals gives the same waits."""
    scenario = Scenario(rate=8.0, max_sequences=1, answer_tokens=1, caching="none", questions=5_000)
    times = replace(NOTHING, prefill_s=0.1)

    asked = [each.at for each in Workload(scenario).questions(6_000)]
    free, first_tokens = 0.0, []
    for at in asked:
        free = max(free, at) + 0.1
        first_tokens.append(free - at)
    outcome = simulate(scenario, times)

    for share, found in ((0.5, outcome.ttft_p50), (0.95, outcome.ttft_p95), (0.99, outcome.ttft_p99)):
        assert found == pytest.approx(percentile(first_tokens[1_000:], share), rel=1e-6)
    assert outcome.decoders == pytest.approx(0.8, rel=0.05)


@pytest.mark.parametrize("exponent", [0.6, 1.0])
def test_hit_rates_are_those_of_an_lru_cache(exponent: float) -> None:
    """Che's approximation (Che, Tung, Wang, 2002) for independent requests."""
    blocks, passages = 200, 2_000
    scenario = Scenario(
        passages=passages, top_k=1, variety=1, exponent=exponent, store_mb=0, questions=30_000, rate=100.0
    )
    scenario = replace(scenario, l1_mb=(blocks + 0.5) * scenario.block_bytes / 2**20)

    weights = [rank**-exponent for rank in range(1, passages + 1)]
    rates = [weight / sum(weights) for weight in weights]
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        held = sum(1 - math.exp(-rate * middle) for rate in rates)
        low, high = (middle, high) if held < blocks else (low, middle)
    expected = sum(rate * (1 - math.exp(-rate * low)) for rate in rates)

    assert simulate(scenario, NOTHING).shares["decoder"] == pytest.approx(expected, abs=0.015)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), max_size=60))
def test_tiers_forget_what_the_served_ones_forget(used: list[tuple[int, int]]) -> None:
    sizes: dict[int, int] = {}
    tier: Lru[int, int] = Lru(10, int)
    store = BlockStore(10)
    for key, size in used:
        size = sizes.setdefault(key, size)
        if tier.get(key) is None:
            tier.put(key, size)
        document = DocumentId("tenant", "collection", "document")
        if store.get(str(key), document) is None:
            store.put(str(key), None, size, "tenant", [document], [])
        assert {each for each in sizes if each in tier} == {each for each in sizes if str(each) in store}


def test_blocks_of_other_machines_come_over_the_network_and_are_counted_once() -> None:
    one = simulate(SMALL, StageTimes())
    four = simulate(replace(SMALL, machines=4, rate=4.0), StageTimes())

    assert one.shares["network"] == 0 and one.links == 0
    assert four.shares["network"] > 2 * four.shares["store"] > 0
    assert four.shares["encoded"] < one.shares["encoded"]
    for outcome in (one, four):
        assert sum(outcome.shares.values()) == pytest.approx(1)


def test_a_decoder_that_holds_the_blocks_finds_more_of_them() -> None:
    shorter, held = (
        simulate(replace(SMALL, machines=4, rate=4.0, routing=routing), StageTimes()) for routing in ("shorter", "held")
    )

    assert held.shares["decoder"] > 1.5 * shorter.shares["decoder"]


def test_a_disk_tier_saves_encoding() -> None:
    without, disk = (simulate(replace(SMALL, disk_mb=disk), StageTimes()) for disk in (0, 20_000))

    assert disk.shares["encoded"] < 0.01 < without.shares["encoded"]
    assert disk.ttft_p95 < without.ttft_p95


def test_too_much_load_is_told() -> None:
    assert simulate(replace(SMALL, rate=40.0), StageTimes()).growing
    assert not simulate(replace(SMALL, rate=0.2), StageTimes()).growing


def test_prefix_caching_finds_only_prompts_that_begin_alike() -> None:
    any_order = replace(SMALL, caching="prefix")
    one_order = replace(any_order, variety=1, top_k=1)

    assert simulate(any_order, StageTimes()).shares["decoder"] < 0.2
    assert simulate(one_order, StageTimes()).shares["decoder"] > 0.5


def test_twice_the_load_needs_twice_the_machines() -> None:
    asked = replace(SMALL, questions=500, disk_mb=20_000)
    few = smallest(replace(asked, rate=20.0), StageTimes(), 1.0)
    many = smallest(replace(asked, rate=40.0), StageTimes(), 1.0)

    assert few is not None and many is not None
    assert few[1].ttft_p95 <= 1.0
    assert many[0].machines == pytest.approx(2 * few[0].machines, rel=0.3)


def test_what_no_machine_can_keep_is_told() -> None:
    assert smallest(replace(SMALL, questions=100), replace(StageTimes(), before_s=2.0), 1.0) is None
    rows = beside_others(replace(SMALL, questions=100), StageTimes(), 5.0)
    assert [scenario.caching for scenario, _ in rows] == ["block", "prefix", "none"]
