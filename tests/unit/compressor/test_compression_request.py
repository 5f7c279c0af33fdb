import math

import pytest

from blockrag.compressor.compression_request import (
    CompressionAbility,
    CompressionRequest,
    read_compression,
    sizes_decide,
)
from blockrag.errors import InvalidRequestError
from blockrag.v1.common_pb2 import ATTENTION_MODE_BLOCK, ATTENTION_MODE_FULL, ATTENTION_MODE_NONE, Compression

ABLE = CompressionAbility("reader", 8, frozenset({"query", "blind"}))
UNABLE = CompressionAbility("plain", 16, None)


def read(message: Compression, ability: CompressionAbility = ABLE) -> CompressionRequest | None:
    return read_compression(message, ATTENTION_MODE_BLOCK, ability)


def test_nothing_is_asked() -> None:
    assert read(Compression()) is None
    assert read(Compression(), UNABLE) is None
    assert read(Compression(rate=1)) is read(Compression(rate=1), UNABLE) is None
    assert read_compression(Compression(), ATTENTION_MODE_FULL, UNABLE) is None


@pytest.mark.parametrize(
    ("message", "kind", "limit"),
    [
        (Compression(rate=4), "rate", 4.0),
        (Compression(rate=1, policy="query"), "rate", 1.0),
        (Compression(rate=8), "rate", 8.0),
        (Compression(max_context_tokens=1), "max_context_tokens", 1.0),
        (Compression(max_ttft_ms=0.5), "max_ttft_ms", 0.5),
    ],
)
def test_each_budget(message: Compression, kind: str, limit: float) -> None:
    found = read(message)
    assert found is not None
    assert (found.kind, found.limit, found.policy) == (kind, limit, "query")


@pytest.mark.parametrize("ability", [ABLE, UNABLE])
@pytest.mark.parametrize("policy", ["", "retrieval"])
def test_what_the_question_needs(ability: CompressionAbility, policy: str) -> None:
    found = read(Compression(auto=True, policy=policy), ability)
    assert found == CompressionRequest("auto", 0.0, "retrieval")
    assert found.to_message() == Compression(auto=True, policy="retrieval")
    assert not sizes_decide(found, ability)


@pytest.mark.parametrize(
    ("policies", "asked", "chosen"),
    [
        ({"query", "blind"}, "", "query"),
        ({"blind"}, "", "blind"),
        (set(), "", "retrieval"),
        ({"query"}, "retrieval", "retrieval"),
        ({"query", "mine"}, "mine", "mine"),
    ],
)
def test_who_chooses(policies: set[str], asked: str, chosen: str) -> None:
    found = read(Compression(rate=2, policy=asked), CompressionAbility("reader", 8, frozenset(policies)))
    assert found is not None
    assert found.policy == chosen


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Compression(rate=0.99), "compression.rate"),
        (Compression(rate=8.01), "compression.rate"),
        (Compression(rate=math.nan), "compression.rate"),
        (Compression(rate=-4), "compression.rate"),
        (Compression(max_context_tokens=0), "compression.max_context_tokens"),
        (Compression(max_ttft_ms=0), "compression.max_ttft_ms"),
        (Compression(max_ttft_ms=-1), "compression.max_ttft_ms"),
        (Compression(max_ttft_ms=math.inf), "compression.max_ttft_ms"),
        (Compression(max_ttft_ms=math.nan), "compression.max_ttft_ms"),
        (Compression(rate=4, policy="oracle"), "compression.policy"),
        (Compression(policy="query"), "compression"),
        (Compression(auto=False), "compression.auto"),
        (Compression(auto=True, policy="query"), "compression.policy"),
    ],
)
def test_what_cannot_be_is_named(message: Compression, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("message", "decided"),
    [
        (Compression(), True),
        (Compression(rate=8), True),
        (Compression(rate=8, policy="query"), True),
        (Compression(rate=7.9), False),
        (Compression(rate=1), True),
        (Compression(rate=1, policy="query"), False),
        (Compression(rate=2, policy="retrieval"), True),
        (Compression(max_context_tokens=100), False),
        (Compression(max_context_tokens=100, policy="retrieval"), True),
        (Compression(max_ttft_ms=100), False),
        (Compression(max_ttft_ms=100, policy="retrieval"), False),
    ],
)
def test_what_sizes_decide(message: Compression, decided: bool) -> None:
    assert sizes_decide(read(message), ABLE) is decided


@pytest.mark.parametrize(
    ("message", "decided"),
    [
        (Compression(), True),
        (Compression(rate=4), True),
        (Compression(rate=4, policy="sentences"), False),
        (Compression(max_ttft_ms=90), False),
        (Compression(max_ttft_ms=90, policy="sentences"), False),
    ],
)
def test_what_sizes_decide_without_a_chunk_encoder(message: Compression, decided: bool) -> None:
    assert sizes_decide(read(message, UNABLE), UNABLE) is decided


def test_without_a_chunk_encoder_retrieval_chooses() -> None:
    assert read(Compression(rate=4), UNABLE) == CompressionRequest("rate", 4.0, "retrieval")
    assert read(Compression(max_context_tokens=9), UNABLE) == CompressionRequest("max_context_tokens", 9.0, "retrieval")
    assert read(Compression(rate=4, policy="sentences"), UNABLE).policy == "sentences"  # type: ignore[union-attr]
    assert read(Compression(max_ttft_ms=90), UNABLE) == CompressionRequest("max_ttft_ms", 90.0, "retrieval")
    with pytest.raises(InvalidRequestError, match="is 'query'; the bundle has sentences, retrieval"):
        read(Compression(rate=4, policy="query"), UNABLE)


@pytest.mark.parametrize("mode", [ATTENTION_MODE_FULL, ATTENTION_MODE_NONE])
def test_only_cached_blocks_can_be_compressed(mode: int) -> None:
    with pytest.raises(InvalidRequestError, match="attention_mode block only"):
        read_compression(Compression(rate=4), mode, ABLE)  # type: ignore[arg-type]
