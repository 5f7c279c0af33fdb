"""Which of several decoders a question goes to."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.request_router import PendingRequest

from blockrag.decoder.routing import FETCH_MS, READ_MS, REQUEST_MS, Affinity, AffinityRouter, Block
from blockrag.v1.common_pb2 import PromptBlock, RequestContext
from blockrag.v1.decoder_pb2 import DecodeRequest, GetDecoderStatusRequest

FIRST, SECOND, THIRD = (1, 100), (2, 100), (3, 300)


class Apart:
    """Decoders with a node each."""

    def __init__(self, held_tokens: int) -> None:
        self._affinity = Affinity(held_tokens, stored_tokens=0)

    def order(self, waiting: dict[str, int], blocks: Sequence[Block]) -> list[str]:
        return self._affinity.order(waiting, blocks, {name: name for name in waiting})

    def sent(self, name: str, blocks: Sequence[Block]) -> None:
        self._affinity.sent(name, blocks, name)

    def keep(self, names: Sequence[str]) -> None:
        self._affinity.keep({name: name for name in names})


def test_a_question_goes_where_most_of_its_blocks_went() -> None:
    affinity = Apart(1000)
    affinity.sent("a", [FIRST, SECOND])
    affinity.sent("b", [THIRD])
    assert affinity.order({"a": 0, "b": 0}, [FIRST, SECOND]) == ["a", "b"]
    assert affinity.order({"a": 0, "b": 0}, [FIRST, THIRD]) == ["b", "a"]


def test_a_busy_decoder_is_passed_over_unless_it_spares_more_than_its_wait() -> None:
    affinity = Apart(100_000)
    affinity.sent("a", [FIRST])
    assert affinity.order({"a": 1, "b": 0}, [FIRST]) == ["b", "a"]
    long = (9, 1 + int(REQUEST_MS / FETCH_MS))
    affinity.sent("a", [long])
    assert affinity.order({"a": 1, "b": 0}, [long]) == ["a", "b"]


def test_a_node_holds_for_all_of_its_decoders_what_one_of_them_read() -> None:
    affinity = Affinity(300, 1000)
    nodes = {"a": "left", "b": "left", "c": "right"}
    affinity.sent("a", [FIRST, SECOND], "left")
    affinity.sent("c", [SECOND], "right")
    assert affinity.order({"a": 0, "b": 0, "c": 0}, [FIRST], nodes) == ["a", "b", "c"]
    assert affinity.order({"a": 1, "b": 0, "c": 0}, [FIRST], nodes) == ["b", "c", "a"]
    assert affinity.order({"b": 0, "c": 0}, [FIRST, SECOND], nodes) == ["b", "c"]
    assert affinity.order({"b": 0, "c": 0}, [SECOND], nodes) == ["c", "b"]  # in memory, beside in the node's store
    affinity.sent("a", [(4, 900)], "left")  # more than its memory holds; the store lets FIRST go for it
    assert affinity.order({"b": 0, "c": 0}, [(4, 900)], nodes) == ["b", "c"]
    affinity.keep({"b": "left", "c": "right"})
    assert affinity.order({"b": 0, "c": 0}, [(4, 900)], nodes) == ["b", "c"]
    affinity.keep({"c": "right"})
    affinity.keep({"b": "left", "c": "right"})
    assert affinity.order({"b": 0, "c": 0}, [SECOND], nodes) == ["c", "b"]


def test_a_node_is_preferred_for_a_far_copy_and_less_than_memory() -> None:
    assert READ_MS < FETCH_MS
    affinity = Affinity(1000, 1000)
    affinity.sent("a", [FIRST], "left")
    affinity.sent("c", [SECOND], "right")
    nodes = {"b": "left", "c": "right"}
    big = (5, 500)
    affinity.sent("a", [big], "left")
    assert affinity.order({"b": 0, "c": 0}, [big, SECOND], nodes) == ["b", "c"]


def test_what_a_decoder_has_forgotten_since_does_not_count() -> None:
    affinity = Apart(300)
    affinity.sent("a", [FIRST, SECOND])
    affinity.sent("b", [SECOND])
    affinity.sent("a", [(4, 200)])  # FIRST leaves, SECOND stays
    assert affinity.order({"a": 0, "b": 1}, [SECOND])[0] == "a"
    affinity.sent("b", [FIRST])
    assert affinity.order({"a": 0, "b": 0}, [FIRST]) == ["b", "a"]


def test_a_decoder_that_went_away_is_forgotten() -> None:
    affinity = Apart(300)
    unknown = affinity.order({"a": 0, "b": 0}, [FIRST])
    affinity.sent(unknown[1], [FIRST])
    assert affinity.order({"a": 0, "b": 0}, [FIRST]) == unknown[::-1]
    affinity.keep([unknown[0]])
    assert affinity.order({"a": 0, "b": 0}, [FIRST]) == unknown


def test_equal_decoders_share_what_is_new_and_every_gateway_places_it_alike() -> None:
    first, second = Apart(10_000), Apart(10_000)
    everybody = dict.fromkeys("abcd", 0)
    placed = [first.order(everybody, [(number, 10)])[0] for number in range(800)]
    assert placed == [second.order(everybody, [(number, 10)])[0] for number in range(800)]
    assert all(100 < count < 300 for count in Counter(placed).values())


def test_a_decoder_that_comes_takes_only_its_part() -> None:
    affinity = Apart(10_000)
    before, after = (
        [affinity.order(dict.fromkeys(names, 0), [(number, 10)])[0] for number in range(800)]
        for names in ("abc", "abcd")
    )
    assert all(new in (old, "d") for old, new in zip(before, after, strict=True))


def test_the_same_blocks_have_the_same_names_in_every_process() -> None:
    program = (
        "from tests.unit.decoder.test_routing import _asked; from blockrag.decoder.routing import _blocks;"
        "print(_blocks(_asked('t', [1, 2, 3], [4])))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@given(
    waiting=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5), min_size=1),
    sent=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 8), st.integers(1, 200)), max_size=30),
    asked=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 200)), max_size=6),
)
def test_everybody_is_ordered_once(waiting: dict[str, int], sent: list[Any], asked: list[Any]) -> None:
    affinity = Apart(500)
    for name, block, tokens in sent:
        affinity.sent(name, [(block, tokens)])
    assert sorted(affinity.order(waiting, asked)) == sorted(waiting)


class _Replica:
    def __init__(self, name: str) -> None:
        self.replica_id = name
        self.node_id = f"node of {name}"


class _Queues:
    def __init__(self, lengths: dict[str, int]) -> None:
        self.get = lengths.get


class _Router(AffinityRouter):
    """The router without Serve's own state: what it reads is given."""

    def __init__(self, lengths: dict[str, int]) -> None:
        self.initialize_state(held_tokens=1000, stored_tokens=5000)
        self._lengths = lengths

    @property
    def curr_replicas(self) -> dict[str, Any]:
        return {name: _Replica(name) for name in "ab"}

    @property
    def replica_queue_len_cache(self) -> Any:
        return _Queues(self._lengths)

    def choose(self, pending: Any) -> list[str]:
        ranks = asyncio.run(self.choose_replicas([_Replica("a"), _Replica("b")], pending))
        return [replica.replica_id for rank in ranks for replica in rank]


def _asked(tenant: str, *blocks: list[int]) -> PendingRequest:
    request = DecodeRequest(
        context=RequestContext(tenant=tenant), blocks=[PromptBlock(token_ids=ids) for ids in blocks]
    )
    return PendingRequest(args=[request], kwargs={}, metadata=None, future=None)


def test_serves_router_orders_by_what_it_routed() -> None:
    router = _Router({"a": 0})
    router.on_request_routed(_asked("t", [1, 2, 3]), "b", None)
    assert all(router.choose(_asked("t", [1, 2, 3], [4])) == ["b", "a"] for _ in range(20))


def test_blocks_are_the_tenants_own() -> None:
    router = _Router({})
    tenants = [f"tenant {number}" for number in range(60)]
    assert {router.choose(_asked(tenant, [1, 2, 3]))[0] for tenant in tenants} == {"a", "b"}


@pytest.mark.parametrize(
    "pending",
    [None, PendingRequest(args=[GetDecoderStatusRequest()], kwargs={}, metadata=None, future=None)],
    ids=["none", "status"],
)
def test_what_has_no_blocks_goes_anywhere(pending: PendingRequest | None) -> None:
    assert {_Router({}).choose(pending)[0] for _ in range(60)} == {"a", "b"}
