from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.encoder.batcher import Batcher


class Computer:
    """Doubles numbers, records its batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.threads: set[int] = set()
        self.running = 0
        self.most_running = 0

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        self.entered.set()
        if not self.go.wait(10):
            raise TimeoutError
        self.running -= 1
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]

    async def until_entered(self) -> None:
        await asyncio.to_thread(self.entered.wait, 10)
        self.entered.clear()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_arrives_together_is_computed_together() -> None:
    computer = Computer()
    batcher = Batcher(computer, max_size=100, wait_s=0.005)
    results = await asyncio.gather(*(batcher.submit(item, 1) for item in range(10)))
    assert results == [2 * item for item in range(10)]
    assert computer.batches == [list(range(10))]
    assert (batcher.stats.items, batcher.stats.size, batcher.stats.batches) == (10, 10, 1)


async def test_a_full_batch_does_not_wait() -> None:
    computer = Computer()
    batcher = Batcher(computer, max_size=4, wait_s=1000.0)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(batcher.submit(item, 2) for item in range(4))) == [0, 2, 4, 6]
    assert computer.batches == [[0, 1], [2, 3]]


async def test_an_item_larger_than_the_budget_is_computed_alone() -> None:
    computer = Computer()
    batcher = Batcher(computer, max_size=10, wait_s=0.005)
    await asyncio.gather(*(batcher.submit(item, size) for item, size in enumerate([3, 50, 3, 3])))
    assert computer.batches == [[0], [1], [2, 3]]


async def test_what_arrives_during_a_computation_is_the_next_batch() -> None:
    computer = Computer()
    computer.go.clear()
    batcher = Batcher(computer, max_size=100, wait_s=0.0)
    first = asyncio.ensure_future(batcher.submit(1, 1))
    await computer.until_entered()
    others = [asyncio.ensure_future(batcher.submit(item, 1)) for item in (2, 3)]
    await settle()  # the event loop is free while the thread computes
    computer.go.set()
    assert await asyncio.gather(first, *others) == [2, 4, 6]
    assert computer.batches == [[1], [2, 3]]
    assert computer.most_running == 1


async def test_an_error_reaches_its_item_only() -> None:
    computer = Computer()
    batcher = Batcher(computer, max_size=2, wait_s=0.005)
    outcomes = await asyncio.gather(*(batcher.submit(item, 1) for item in (1, -1, 3, 4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, ValueError, int, int]
    assert computer.batches == [[1, -1], [1], [-1], [3, 4]]
    assert await batcher.submit(5, 1) == 10
    assert (batcher.stats.items, batcher.stats.batches) == (5, 3)


async def test_who_left_before_a_batch_failed_is_not_computed_again() -> None:
    computer = Computer()
    computer.go.clear()
    batcher = Batcher(computer, max_size=100, wait_s=0.005)
    waiting = [asyncio.ensure_future(batcher.submit(item, 1)) for item in (1, 2, -1)]
    await computer.until_entered()
    waiting[1].cancel()
    await settle()
    computer.go.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, asyncio.CancelledError, ValueError]
    assert computer.batches == [[1, 2, -1], [1], [-1]]


async def test_a_wrong_number_of_results_is_an_error() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: [1], max_size=2, wait_s=0.005)
    outcomes = await asyncio.gather(batcher.submit(1, 1), batcher.submit(2, 1), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]


async def test_items_whose_callers_left_are_not_computed() -> None:
    computer = Computer()
    computer.go.clear()
    batcher = Batcher(computer, max_size=100, wait_s=0.0)
    first = asyncio.ensure_future(batcher.submit(1, 1))
    await computer.until_entered()
    waiting = [asyncio.ensure_future(batcher.submit(item, 1)) for item in (2, 3, 4)]
    await settle()
    waiting[1].cancel()
    first.cancel()  # too late for this one: it is being computed
    await settle()
    computer.go.set()
    assert await asyncio.gather(waiting[0], waiting[2]) == [4, 8]
    assert computer.batches == [[1], [2, 4]]
    assert batcher.stats.items == 3


async def test_a_queue_of_items_nobody_waits_for_computes_nothing() -> None:
    computer = Computer()
    batcher = Batcher(computer, max_size=100, wait_s=0.001)
    waiting = [asyncio.ensure_future(batcher.submit(item, 1)) for item in range(3)]
    await settle()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await batcher.submit(7, 1) == 14
    assert computer.batches == [[7]]


async def test_one_thread_computes() -> None:
    computer = Computer()
    batcher = Batcher(computer, max_size=1, wait_s=0.0)
    await asyncio.gather(*(batcher.submit(item, 1) for item in range(20)))
    assert len(computer.threads) == 1
    assert threading.get_ident() not in computer.threads


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(1, 20), st.sampled_from([0.0, 0.001]))
def test_every_item_is_computed_once_in_order_within_the_budget(sizes: list[int], max_size: int, wait_s: float) -> None:
    computer = Computer()

    async def run() -> list[int]:
        batcher = Batcher(computer, max_size=max_size, wait_s=wait_s)
        return await asyncio.gather(*(batcher.submit(item, size) for item, size in enumerate(sizes)))

    assert asyncio.run(run()) == [2 * item for item in range(len(sizes))]
    assert [item for batch in computer.batches for item in batch] == list(range(len(sizes)))
    for batch in computer.batches:
        assert sum(sizes[item] for item in batch) <= max_size or len(batch) == 1


@pytest.mark.parametrize(("max_size", "wait_s"), [(0, 0.0), (1, -1.0)])
def test_impossible_limits_are_refused(max_size: int, wait_s: float) -> None:
    with pytest.raises(ValueError, match="max_size"):
        Batcher(Computer(), max_size=max_size, wait_s=wait_s)
