"""Which plans are made in the gateway, with a real tokenizer and a counted compressor."""

from __future__ import annotations

import pytest

from blockrag.compressor.compression_request import (
    CompressionAbility,
    CompressionRequest,
    read_compression,
    sizes_decide,
)
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageDrafts, PassageTokenizer
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.errors import InvalidRequestError, PromptTooLongError
from blockrag.gateway.planning import MOST_UNKNOWN_CHARS, NearPlanner
from blockrag.v1.common_pb2 import ATTENTION_MODE_BLOCK, ATTENTION_MODE_NONE, Compression, Passage
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse, PrepareQuestionRequest
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer

from .fakes import FakePlanner

ABILITY = CompressionAbility("tiny", 4, frozenset({"query"}))


def make_planner() -> Planner:
    tokenizer = make_tiny_tokenizer()
    passages = PassageTokenizer(tokenizer, TEST_TEMPLATE)
    drafts = PassageDrafts(detokenizer_factory(tokenizer, ""), ABILITY.chunk_tokens)
    return Planner(passages, 40_000, ABILITY, drafts)


class Compressor(FakePlanner):
    """Plans like the service, but without compression where a policy would have a say; counts."""

    def __init__(self) -> None:
        super().__init__()
        self._planner = make_planner()

    async def plan(self, request: PlanRequest, compression: CompressionRequest | None = None) -> PlanResponse:
        self.requests.append(request)
        simpler = PlanRequest()
        simpler.CopyFrom(request)
        if not sizes_decide(read_compression(request.compression, request.attention_mode, ABILITY), ABILITY):
            simpler.ClearField("compression")
        return await self._planner.plan(simpler)


@pytest.fixture
def compressor() -> Compressor:
    return Compressor()


@pytest.fixture
def near(compressor: Compressor) -> NearPlanner:
    return NearPlanner(make_planner(), compressor)


def request(*texts: str, compression: Compression | None = None, mode: int = ATTENTION_MODE_BLOCK) -> PlanRequest:
    return PlanRequest(
        question="where is it",
        passages=[Passage(passage_id=f"p{place}", title="a", text=text) for place, text in enumerate(texts)],
        attention_mode=mode,  # type: ignore[arg-type]
        max_tokens=8,
        compression=compression,
    )


async def planned(near: NearPlanner, asked: PlanRequest) -> PlanResponse:
    return await near.plan(asked, read_compression(asked.compression, asked.attention_mode, ABILITY))


BUDGETS = (
    Compression(),
    Compression(rate=4),
    Compression(rate=2, policy="retrieval"),
    Compression(max_context_tokens=5, policy="retrieval"),
)


async def test_a_plan_that_sizes_decide_is_the_compressors_made_here(near: NearPlanner, compressor: Compressor) -> None:
    budgets = [request("one", "two and three", compression=budget) for budget in BUDGETS]
    for asked in (request("one", "two words"), *budgets, request(), request("one", mode=ATTENTION_MODE_NONE)):
        made = await planned(near, asked)
        assert compressor.requests == []
        assert made == await compressor.plan(asked)
        compressor.requests.clear()


@pytest.mark.parametrize(
    "budget", [Compression(rate=2), Compression(max_context_tokens=9), Compression(max_ttft_ms=9, policy="retrieval")]
)
async def test_what_takes_a_policy_or_a_prediction_is_the_compressors(
    near: NearPlanner, compressor: Compressor, budget: Compression
) -> None:
    asked = request("one", compression=budget)
    await planned(near, asked)
    assert compressor.requests == [asked]
    await near.prepare_question(PrepareQuestionRequest(question="where"))
    assert compressor.prepared == ["where"]


async def test_long_unknown_text_is_tokenised_by_the_compressor_once(near: NearPlanner, compressor: Compressor) -> None:
    asked = request("word " * (MOST_UNKNOWN_CHARS // 5), "and more than that")
    first = await planned(near, asked)
    assert compressor.requests == [asked]
    assert await planned(near, asked) == first
    assert len(compressor.requests) == 1


async def test_the_words_of_long_text_are_the_compressors_once(near: NearPlanner, compressor: Compressor) -> None:
    """Tokens that are known from a plan without compression come without the words of chunks."""
    texts = ["word " * (MOST_UNKNOWN_CHARS // 5), "and more than that"]
    await planned(near, request(*texts))
    compressed = request(*texts, compression=Compression(rate=4))
    compressed.max_context_tokens = 100  # the long passage is dropped
    first = await planned(near, compressed)
    assert len(compressor.requests) == 2
    assert {passage.in_prompt for passage in first.passages} == {True, False}
    assert await planned(near, compressed) == first
    whole = request(*texts, compression=Compression(rate=4))
    assert await planned(near, whole) == await compressor.plan(whole)
    assert len(compressor.requests) == 3


async def test_what_does_not_fit_is_refused_here(near: NearPlanner, compressor: Compressor) -> None:
    asked = request()
    asked.max_tokens = 40_000
    with pytest.raises(PromptTooLongError):
        await planned(near, asked)
    with pytest.raises(InvalidRequestError, match="has no text"):
        await planned(near, request(""))
    assert compressor.requests == []
