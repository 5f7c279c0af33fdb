from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.kv_cache.purge_log import Departed
from blockrag.kv_cache.shard_messages import DocumentId
from blockrag.kv_cache.store import BlockStore, Entry

DOCUMENT = DocumentId("t", "c", "d")
OTHER = DocumentId("t", "c", "other")
NOTHING = DocumentId("t", "", "")


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def put(
    store: BlockStore,
    key: str,
    nbytes: int = 10,
    document: DocumentId = DOCUMENT,
    *,
    pinned: bool = False,
    ref: object = None,
) -> Entry | None:
    return store.put(key, ref, nbytes, document.tenant, {document}, {document} if pinned else ())


def held(store: BlockStore, keys: str) -> str:
    return "".join(key for key in keys if key in store)


def test_a_stored_block_is_found_and_an_unknown_one_is_not() -> None:
    store = BlockStore(100)
    put(store, "a", ref="object")
    entry = store.get("a", DOCUMENT)
    assert entry is not None
    assert (entry.ref, entry.nbytes) == ("object", 10)
    assert store.get("b", DOCUMENT) is None


def test_the_least_recently_used_block_makes_room() -> None:
    store = BlockStore(30)
    for key in "abc":
        put(store, key)
    store.get("a", DOCUMENT)
    put(store, "d")
    assert held(store, "abcd") == "acd"
    assert (store.evictions, store.nbytes, len(store)) == (1, 30, 3)


def test_looking_whether_a_key_is_held_does_not_make_it_recent() -> None:
    store = BlockStore(20)
    put(store, "a")
    put(store, "b")
    assert "a" in store
    put(store, "c")
    assert held(store, "abc") == "bc"


def test_pinned_blocks_are_never_evicted() -> None:
    store = BlockStore(30)
    put(store, "a", pinned=True)
    for key in "bcdef":
        put(store, key)
    assert held(store, "abcdef") == "aef"
    assert store.pinned_blocks == 1


def test_a_block_that_cannot_fit_evicts_nothing() -> None:
    store = BlockStore(30)
    put(store, "a", 15, pinned=True)
    put(store, "b", 15)
    assert put(store, "c", 20) is None
    assert (held(store, "abc"), store.evictions) == ("ab", 0)
    assert put(BlockStore(30), "larger than all", 31) is None


def test_unpinned_blocks_can_be_evicted_again() -> None:
    store = BlockStore(20)
    put(store, "a", pinned=True)
    put(store, "b")
    assert store.set_pins(DOCUMENT, False) == 1
    store.get("b", DOCUMENT)
    put(store, "c")
    assert held(store, "abc") == "bc"


def test_a_block_stays_pinned_while_one_of_its_documents_pins_it() -> None:
    store = BlockStore(100)
    put(store, "a", pinned=True)
    store.get("a", OTHER, pin=True)
    assert store.set_pins(DOCUMENT, False) == 1
    assert store.pinned_blocks == 1
    assert store.set_pins(OTHER, False) == 1
    assert store.pinned_blocks == 0


def test_pinning_a_collection_pins_all_of_its_documents() -> None:
    store = BlockStore(100)
    put(store, "a")
    put(store, "b", document=OTHER)
    put(store, "z", document=DocumentId("t", "another", "d"))
    assert store.set_pins(DocumentId("t", "c", ""), True) == 2
    assert store.set_pins(DocumentId("t", "c", ""), True) == 0
    assert store.pinned_blocks == 2


def test_time_to_live_counts_from_the_last_use() -> None:
    clock = Clock()
    store = BlockStore(100, ttl_s=10, clock=clock)
    put(store, "a")
    put(store, "b")
    put(store, "p", pinned=True)
    clock.now += 8
    store.get("a", DOCUMENT)
    clock.now += 8
    assert held(store, "abp") == "ap"
    assert store.expirations == 1
    clock.now += 1000
    assert held(store, "ap") == "p"


def test_an_unpinned_block_lives_its_time_to_live_from_then() -> None:
    clock = Clock()
    store = BlockStore(100, ttl_s=10, clock=clock)
    put(store, "a", pinned=True)
    clock.now += 50
    store.set_pins(DOCUMENT, False)
    clock.now += 9
    assert "a" in store
    clock.now += 2
    assert "a" not in store


def test_a_tenant_over_its_share_evicts_its_own_blocks_only() -> None:
    store = BlockStore(100, tenant_share=0.3)
    mine, theirs = DocumentId("mine", "c", "d"), DocumentId("theirs", "c", "d")
    put(store, "x", document=theirs)
    for key in "abcd":
        put(store, key, document=mine)
    assert held(store, "xabcd") == "xbcd"
    usage = {each.tenant: (each.blocks, each.bytes) for each in store.tenants()}
    assert usage == {"mine": (3, 30), "theirs": (1, 10)}


def test_a_tenant_cannot_pin_more_than_its_share() -> None:
    store = BlockStore(100, tenant_share=0.3)
    for key in "abc":
        put(store, key, pinned=True)
    assert put(store, "d", pinned=True) is None
    assert put(store, "e") is None
    assert put(store, "x", document=DocumentId("other", "c", "d")) is not None


def test_purging_a_document_forgets_its_blocks_even_pinned_ones() -> None:
    store = BlockStore(100)
    start = store.journal.since(0).cursor
    put(store, "a", pinned=True)
    put(store, "b")
    put(store, "z", document=OTHER)
    assert store.purge(DOCUMENT) == 2
    assert held(store, "abz") == "z"
    assert store.journal.since(start).keys == ["a", "b"]
    assert (store.nbytes, store.pinned_blocks) == (10, 0)
    assert store.purge(DOCUMENT) == 0


def test_a_block_shared_with_another_document_outlives_a_purge() -> None:
    store = BlockStore(100)
    put(store, "a", pinned=True)
    store.get("a", OTHER)
    assert store.purge(DOCUMENT) == 0
    assert "a" in store
    assert store.pinned_blocks == 0
    assert store.purge(OTHER) == 1
    assert "a" not in store


def test_a_block_also_asked_for_without_a_document_is_purged_with_its_document() -> None:
    store = BlockStore(100)
    put(store, "a")
    store.get("a", NOTHING)
    put(store, "instruction", document=NOTHING)
    assert store.purge(DOCUMENT) == 1
    assert "instruction" in store


def test_purging_a_collection_leaves_other_collections_and_tenants() -> None:
    store = BlockStore(100)
    put(store, "a")
    put(store, "b", document=OTHER)
    put(store, "x", document=DocumentId("t", "another", "d"))
    put(store, "y", document=DocumentId("other tenant", "c", "d"))
    assert store.purge(DocumentId("t", "c", "")) == 2
    assert held(store, "abxy") == "xy"


def test_a_purge_tells_readers_of_blocks_that_were_evicted_before() -> None:
    """A decoder may still have them in its own memory."""
    store = BlockStore(20)
    start = store.journal.since(0).cursor
    put(store, "a")
    put(store, "b", document=OTHER)
    put(store, "c", document=OTHER)
    store.lose("b")
    assert put(store, "too large", 21) is None
    assert store.purge(DOCUMENT) == 0
    assert store.journal.since(start).keys == ["a", "too large"]
    assert store.purge(DocumentId("t", "c", "")) == 1
    assert store.journal.since(start).keys == ["a", "too large", "b", "c"]


def test_readers_must_forget_everything_when_evicted_keys_are_no_longer_known() -> None:
    store = BlockStore(20, departed=Departed(capacity=2))
    start = store.journal.since(0).cursor
    for number in range(6):
        put(store, f"k{number}")
    store.purge(DOCUMENT)
    assert store.journal.since(start).reset


def test_what_readers_forgot_once_is_no_reason_to_forget_again() -> None:
    store = BlockStore(20, departed=Departed(capacity=2))
    for number in range(6):
        put(store, f"k{number}")
    store.purge(OTHER)
    told = store.journal.since(0).cursor
    put(store, "k6")
    store.purge(OTHER)
    assert not store.journal.since(told).reset
    store.purge(DOCUMENT)
    after = store.journal.since(told)
    assert not after.reset
    assert sorted(after.keys) == ["k4", "k5", "k6"]


def test_a_lost_block_is_forgotten_unless_it_was_replaced() -> None:
    store = BlockStore(100)
    old = put(store, "a")
    new = put(store, "a")
    assert old is not None
    assert new is not None
    assert not store.lose("a", old.generation)
    assert store.lose("a", new.generation)
    assert not store.lose("a", new.generation)
    put(store, "a")
    assert store.lose("a")
    assert store.lost == 2


def test_storing_a_key_again_replaces_it() -> None:
    store = BlockStore(100)
    put(store, "a", 10, ref=1, pinned=True)
    put(store, "a", 30, ref=2)
    entry = store.get("a", DOCUMENT)
    assert entry is not None
    assert entry.ref == 2
    assert (store.nbytes, len(store), store.pinned_blocks) == (30, 1, 0)


@pytest.mark.parametrize(("budget", "share"), [(0, 1.0), (10, 0.0), (10, 1.5)])
def test_impossible_limits_are_refused(budget: int, share: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        BlockStore(budget, tenant_share=share)


KEYS = st.sampled_from([f"k{number}" for number in range(12)])
DOCUMENTS = st.sampled_from([DocumentId(tenant, "c", name) for tenant in ("t", "u") for name in "de"])
OPERATIONS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.integers(1, 40), DOCUMENTS, st.booleans()),
    st.tuples(st.just("get"), KEYS, DOCUMENTS, st.booleans()),
    st.tuples(st.just("lose"), KEYS),
    st.tuples(st.just("pin"), DOCUMENTS, st.booleans()),
    st.tuples(st.just("purge"), DOCUMENTS),
    st.tuples(st.just("wait"), st.integers(1, 6)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=60), st.sampled_from([0.5, 1.0]))
def test_the_books_balance_whatever_happens(operations: list[tuple], share: float) -> None:  # type: ignore[type-arg]
    clock = Clock()
    store = BlockStore(100, tenant_share=share, ttl_s=10, clock=clock)
    start = store.journal.since(0).cursor
    seen: dict[DocumentId, set[str]] = {}
    for name, *arguments in operations:
        told = set(store.journal.since(start).keys)
        if name == "put":
            key, nbytes, document, pinned = arguments
            key = f"{document.tenant}-{key}"
            put(store, key, nbytes, document, pinned=pinned)
            seen.setdefault(document, set()).add(key)
        elif name == "get":
            key, document, pin = arguments
            if store.get(f"{document.tenant}-{key}", document, pin=pin):
                seen.setdefault(document, set()).add(f"{document.tenant}-{key}")
        elif name == "lose":
            store.lose(f"t-{arguments[0]}")
        elif name == "pin":
            store.set_pins(*arguments)
        elif name == "purge":
            (document,) = arguments
            store.purge(document)
            purged = seen.pop(document, set())
            shared = set().union(*seen.values()) if seen else set()
            told = set(store.journal.since(start).keys)
            # Every block of the document that nothing else may hold was announced and is gone.
            assert purged - shared <= told
            assert not any(key in store for key in purged - shared)
        else:
            clock.now += arguments[0]
        usage = store.tenants()
        assert store.nbytes == sum(each.bytes for each in usage) <= 100
        assert len(store) == sum(each.blocks for each in usage)
        assert all(each.bytes <= 100 * share for each in usage)
        assert 0 <= store.pinned_blocks <= len(store)
