from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.l1 import L1Cache, L1Entry
from tests.unit.decoder.fakes import FakeBlock


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _cache(budget: int = 300, ttl: float = 60.0, clock: Clock | None = None) -> L1Cache:
    return L1Cache(budget, ttl, clock or Clock())


def _put(cache: L1Cache, *keys: str) -> None:
    for key in keys:
        cache.release([cache.insert(FakeBlock(key))])  # type: ignore[arg-type]


def _held(cache: L1Cache, key: str) -> bool:
    (entry,) = cache.acquire([key])
    if entry is not None:
        cache.release([entry])
    return entry is not None


def test_the_least_recently_used_block_makes_room() -> None:
    cache = _cache()
    _put(cache, "a", "b", "c")
    assert _held(cache, "a")
    _put(cache, "d")
    assert [_held(cache, key) for key in "abcd"] == [True, False, True, True]


def test_pinned_blocks_stay_beyond_the_budget() -> None:
    cache = _cache(budget=150)
    entries = [cache.insert(FakeBlock(key)) for key in "abc"]  # type: ignore[arg-type]
    assert cache.stats().bytes == 300
    assert cache.stats().pinned_blocks == 3
    cache.release(entries[:2])
    assert [_held(cache, key) for key in "abc"] == [False, False, True]
    cache.release(entries[2:])
    assert (cache.stats().bytes, cache.stats().pinned_blocks) == (100, 0)


def test_inserting_again_gives_the_entry_there_is() -> None:
    cache = _cache()
    first, second = cache.insert(FakeBlock("a")), cache.insert(FakeBlock("a"))  # type: ignore[arg-type]
    assert first is second
    assert cache.stats().bytes == 100


def test_unused_blocks_expire_and_pinned_ones_do_not() -> None:
    clock = Clock()
    cache = _cache(ttl=10, clock=clock)
    pinned = cache.insert(FakeBlock("pinned"))  # type: ignore[arg-type]
    _put(cache, "idle")
    clock.now = 5
    _put(cache, "young")
    clock.now = 11
    cache.expire()
    assert [_held(cache, key) for key in ("pinned", "idle", "young")] == [True, False, True]
    cache.release([pinned])
    clock.now = 30
    assert not _held(cache, "pinned")
    assert cache.stats().bytes == 0


def test_a_purged_block_is_not_found_but_lives_until_it_is_released() -> None:
    cache = _cache()
    entry = cache.insert(FakeBlock("a"))  # type: ignore[arg-type]
    cache.purge(["a", "unknown"])
    assert not _held(cache, "a")
    assert cache.stats().bytes == 100
    replacement = cache.insert(FakeBlock("a"))  # type: ignore[arg-type]
    assert replacement is not entry
    cache.release([entry])
    assert cache.stats().bytes == 100
    assert _held(cache, "a")


def test_an_unlisted_block_is_only_its_holders() -> None:
    cache = _cache()
    entry = cache.insert(FakeBlock("a"), listed=False)  # type: ignore[arg-type]
    assert not _held(cache, "a")
    cache.release([entry])
    assert cache.stats().bytes == 0


def test_clear_forgets_everything() -> None:
    cache = _cache()
    _put(cache, "a", "b")
    cache.clear()
    assert (cache.stats().blocks, cache.stats().bytes) == (0, 0)


def test_hits_and_misses_are_counted() -> None:
    cache = _cache()
    _put(cache, "a")
    cache.acquire(["a", "b", "a"])
    assert (cache.stats().hits, cache.stats().misses) == (2, 1)


_STEPS = st.lists(st.tuples(st.sampled_from(["use", "drop", "purge", "tick"]), st.sampled_from("abcdef")), max_size=40)


@given(_STEPS)
def test_bytes_are_those_of_listed_and_held_blocks(steps: list[tuple[str, str]]) -> None:
    clock = Clock()
    cache = _cache(budget=250, ttl=3, clock=clock)
    held: list[L1Entry] = []
    for action, key in steps:
        if action == "use":
            (entry,) = cache.acquire([key])
            held.append(entry or cache.insert(FakeBlock(key)))  # type: ignore[arg-type]
        elif action == "drop" and held:
            cache.release([held.pop(0)])
        elif action == "purge":
            cache.purge([key])
        else:
            clock.now += 1
        stats = cache.stats()
        detached = {id(entry) for entry in held if not entry.listed}
        assert stats.bytes == 100 * (stats.blocks + len(detached))
        assert stats.pinned_blocks == len({id(entry) for entry in held})
        assert stats.bytes <= max(250, 100 * stats.pinned_blocks)
    cache.release(held)
    assert cache.stats().pinned_blocks == 0
