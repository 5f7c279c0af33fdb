"""How tenants share: places and turns."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.fairness import FairQueue, Turns, has_room


@pytest.mark.parametrize(("places", "tenants", "each"), [(64, 1, 32), (64, 2, 21), (8, 1, 4), (4, 1, 2), (1, 1, 1)])
def test_each_of_n_tenants_comes_to_about_as_many_places_as_are_left(places: int, tenants: int, each: int) -> None:
    held: Counter[int] = Counter()
    progress = True
    while progress:
        progress = False
        for tenant in range(tenants):
            if has_room(held[tenant], held.total(), places):
                held[tenant] += 1
                progress = True
    assert {each, each + 1} >= {held[tenant] for tenant in range(tenants)}
    assert places == 1 or has_room(0, held.total(), places)  # for whoever comes next


def test_turns_go_round_whatever_one_of_them_piles_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        queue.append("acme", f"a{number}", 5)
    for number in range(3):
        queue.append("umbrella", f"u{number}", 5)
    assert queue.of("acme") == 10
    assert drained(queue, 7) == ["a0", "u0", "a1", "u1", "a2", "u2", "a3"]
    assert len(queue) == 6


def test_a_long_item_counts_for_as_many_short_ones() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.append("acme", f"a{number}", 30)
    for number in range(6):
        queue.append("umbrella", f"u{number}", 10)
    assert drained(queue, 8) == ["a0", "u0", "u1", "u2", "a1", "u3", "u4", "u5"]


def test_who_was_away_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(20):
        queue.append("acme", f"a{number}", 1)
    drained(queue, 10)
    for number in range(5):
        queue.append("umbrella", f"u{number}", 1)
    taken = drained(queue, 6)
    assert sorted(item[0] for item in taken) == ["a", "a", "a", "u", "u", "u"]


def test_coming_back_does_not_wipe_a_turn_out() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.append("umbrella", "u0", 1)
    queue.append("acme", "a0", 100)
    assert drained(queue, 2) == ["u0", "a0"]
    queue.append("acme", "a1", 1)
    queue.append("umbrella", "u1", 1)
    assert drained(queue, 2) == ["u1", "a1"]


def test_one_that_leaves_is_not_taken() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.append("acme", "a0", 1)
    queue.append("acme", "a1", 1)
    queue.remove("acme", "a0")
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove("acme", "a0")
    assert list(queue) == ["a1"]
    assert drained(queue, 1) == ["a1"]
    with pytest.raises(KeyError):
        queue.take("acme")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=120))
def test_no_tenant_that_waits_gets_more_than_another_by_more_than_two_items(items: list[tuple[str, int]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for item in items:
        queue.append(item[0], item, item[1])
    got: Counter[str] = Counter()
    last: dict[str, int] = {}
    while len({tenant for tenant, _ in queue}) > 1:
        tenant, cost = queue.take(queue.turns()[0][0])
        assert cost == next(size for name, size in items[last.get(tenant, -1) + 1 :] if name == tenant)
        last[tenant] = next(place for place in range(last.get(tenant, -1) + 1, len(items)) if items[place][0] == tenant)
        got[tenant] += cost
        waiting = {name for name, _ in queue}
        assert max(got[name] for name in waiting) - min(got[name] for name in waiting) <= 100


def drained(queue: FairQueue[str], count: int) -> list[str]:
    return [queue.take(queue.turns()[0][0]) for _ in range(count)]


async def test_places_are_passed_on_in_turns_and_not_to_who_has_left() -> None:
    turns, order = Turns(1), []

    async def one(tenant: str, name: str) -> None:
        async with turns.turn(tenant):
            order.append(name)
            await asyncio.sleep(0)

    async with turns.turn("acme"):
        waiting = [asyncio.create_task(one("acme", f"a{number}")) for number in range(4)]
        await asyncio.sleep(0)
        waiting += [asyncio.create_task(one("umbrella", f"u{number}")) for number in range(2)]
        await asyncio.sleep(0)
        waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["a0", "u0", "a2", "u1", "a3"]
    async with asyncio.timeout(1), turns.turn("acme"):
        pass


async def test_who_is_called_and_leaves_in_the_same_moment_passes_its_place_on() -> None:
    turns = Turns(1)

    async def one() -> None:
        async with turns.turn("acme"):
            await asyncio.sleep(0)

    async with turns.turn("acme"):
        leaving = asyncio.create_task(one())
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    async with asyncio.timeout(1), turns.turn("umbrella"):
        pass
