"""Which plans are made in the gateway, with a real tokenizer and a counted compressor."""

from __future__ import annotations

import pytest

from blockrag.compressor.compression import CompressionAbility
from blockrag.compressor.drafts import PassageDrafts
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.errors import InvalidRequestError, PromptTooLongError
from blockrag.gateway.planning import MOST_UNKNOWN_CHARS, NearPlanner
from blockrag.modeling.template import READER_TEMPLATE
from blockrag.v1.common_pb2 import ATTENTION_MODE_BLOCK, ATTENTION_MODE_NONE, Compression, Passage
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse, PrepareQuestionRequest
from tests.models import make_tiny_tokenizer

from .fakes import FakePlanner

ABILITY = CompressionAbility("tiny", 4, frozenset({"query"}))


def make_planner() -> tuple[Planner, PassageTokenizer]:
    tokenizer = make_tiny_tokenizer()
    passages = PassageTokenizer(tokenizer, READER_TEMPLATE)
    drafts = PassageDrafts(detokenizer_factory(tokenizer, ""), ABILITY.chunk_tokens)
    return Planner(passages, 40_000, ABILITY, drafts), passages


class Compressor(FakePlanner):
    """Plans like the service, without a policy, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self._planner, _ = make_planner()

    async def plan(self, request: PlanRequest) -> PlanResponse:
        self.requests.append(request)
        without = PlanRequest()
        without.CopyFrom(request)
        without.ClearField("compression")
        return await self._planner.plan(without)


@pytest.fixture
def compressor() -> Compressor:
    return Compressor()


@pytest.fixture
def near(compressor: Compressor) -> NearPlanner:
    return NearPlanner(*make_planner(), compressor)


def request(*texts: str, compression: Compression | None = None, mode: int = ATTENTION_MODE_BLOCK) -> PlanRequest:
    return PlanRequest(
        question="where is it",
        passages=[Passage(passage_id=f"p{place}", title="a", text=text) for place, text in enumerate(texts)],
        attention_mode=mode,  # type: ignore[arg-type]
        max_tokens=8,
        compression=compression,
    )


async def test_a_plan_without_compression_is_the_compressors_made_here(
    near: NearPlanner, compressor: Compressor
) -> None:
    off = request("one", "two", compression=Compression(off=True))
    for asked in (request("one", "two words"), off, request(), request("one", mode=ATTENTION_MODE_NONE)):
        made = await near.plan(asked)
        assert compressor.requests == []
        assert made == await compressor.plan(asked)
        compressor.requests.clear()


async def test_compression_is_the_compressors(near: NearPlanner, compressor: Compressor) -> None:
    asked = request("one", compression=Compression(rate=2))
    await near.plan(asked)
    assert compressor.requests == [asked]
    await near.prepare_question(PrepareQuestionRequest(question="where"))
    assert compressor.prepared == ["where"]


async def test_long_unknown_text_is_tokenised_by_the_compressor_once(near: NearPlanner, compressor: Compressor) -> None:
    asked = request("word " * (MOST_UNKNOWN_CHARS // 5), "and more than that")
    first = await near.plan(asked)
    assert compressor.requests == [asked]
    assert await near.plan(asked) == first
    assert len(compressor.requests) == 1


async def test_what_does_not_fit_is_refused_here(near: NearPlanner, compressor: Compressor) -> None:
    asked = request()
    asked.max_tokens = 40_000
    with pytest.raises(PromptTooLongError):
        await near.plan(asked)
    with pytest.raises(InvalidRequestError, match="has no text"):
        await near.plan(request(""))
    assert compressor.requests == []
