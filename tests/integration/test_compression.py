"""Compression through the running system, over gRPC: budgets, mixtures, forms in the cache, what is refused."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from blockrag.client import BlockragClient
from blockrag.configured import configured_bundle
from blockrag.errors import InvalidRequestError
from blockrag.evaluation.drawing import Piece
from blockrag.evaluation.reader import PlannedPrompt, Prompt, Reader
from blockrag.results import BlockSlots, Citation, Compression, GivenPassage, TextChunk
from blockrag.v1 import common_pb2
from blockrag.v1.common_pb2 import (
    BLOCK_FORM_CHUNKS,
    BLOCK_FORM_COMPRESSED,
    BLOCK_FORM_FULL,
    CHUNK_FORM_COMPRESSED,
    PromptBlock,
    RequestContext,
    Sampling,
)
from blockrag.v1.compressor_pb2 import PlanRequest
from blockrag.v1.compressor_pb2_grpc import CompressorServiceStub
from blockrag.v1.decoder_pb2 import DecodeRequest
from blockrag.v1.decoder_pb2_grpc import DecoderServiceStub
from blockrag.v1.encoder_pb2 import EncodeBlocksRequest, TokenBlock
from blockrag.v1.encoder_pb2_grpc import EncoderServiceStub
from tests.integration.conftest import CHUNK_TOKENS, Cluster

TOWNS = ("Arle", "Brom", "Cass", "Dorn", "Elke", "Fenn")
FORMS = ("full", f"compressed-{CHUNK_TOKENS}", f"chunks-{CHUNK_TOKENS}")
QUESTION = "How many mills does Dorn have?"
_MARKS = itertools.count()


@pytest.fixture
async def collection(client: BlockragClient) -> AsyncIterator[str]:
    """Six articles with words that no other test knows, so that what is cached is known."""
    name = f"compression-{next(_MARKS)}"
    for number, town in enumerate(TOWNS):
        text = (
            f"{town} of {name} is a town on the river {town}a. It was founded in {1200 + 7 * number} and has "
            f"{number + 3} mills, {2 * number + 5} bridges and a market that is held on every second day of the week."
        )
        await client.ingest_text(f"{town}.txt", text, collection=name, title=town)
    yield name
    await client.delete_collection(name)


async def forms(client: BlockragClient) -> dict[str, dict[str, int]]:
    description = await client.describe()
    return {form["form"]: form for form in description.kv_cache["forms"]}


def slots(citations: tuple[Citation, ...]) -> int:
    sizes = {"expanded": lambda chunk: chunk.end_token - chunk.start_token, "compressed": lambda _: 1}
    return sum(sizes[chunk.form](chunk) for each in citations if each.in_prompt for chunk in each.chunks)


async def test_rate_one_is_the_answer_without_compression(client: BlockragClient, collection: str) -> None:
    for question in (QUESTION, "When was Arle founded?", "What is held on every second day?"):
        options: Any = {"collection": collection, "top_k": 4, "max_tokens": 16}
        plain = await client.ask(question, **options)
        one = await client.ask(question, compression=Compression(rate=1), **options)
        assert one.text == plain.text
        assert one.completion.usage.prompt_tokens == plain.completion.usage.prompt_tokens
        assert one.completion.usage.compressed_chunks == plain.completion.usage.compressed_chunks == 0
        assert one.completion.usage.encoded_tokens == 0


@pytest.mark.parametrize("policy", ["", "query", "blind", "retrieval"])
@pytest.mark.parametrize("rate", [2.0, 4.0, 8.0])
async def test_a_mixture_streams_and_is_cited(
    client: BlockragClient, collection: str, rate: float, policy: str
) -> None:
    pieces = []
    async for event in client.generate(
        QUESTION, collection=collection, top_k=5, max_tokens=8, compression=Compression(rate, policy=policy)
    ):
        pieces.append(event)
    done = pieces[-1]
    assert not isinstance(done, TextChunk)
    retrieved = pieces[0]
    usage = done.usage
    assert all(citation.in_prompt for citation in done.citations)
    assert usage.context_tokens == sum(citation.tokens for citation in done.citations)
    tally = Counter(chunk.form for citation in done.citations for chunk in citation.chunks)
    assert tally["compressed"] == usage.compressed_chunks > 0
    taken = slots(done.citations)
    assert usage.prompt_tokens == usage.cached_tokens + usage.encoded_tokens + usage.prefill_tokens
    assert usage.cached_tokens + usage.encoded_tokens == taken + 1, "the instruction block has one token"
    if rate < CHUNK_TOKENS:
        assert tally["expanded"] > 0
        assert usage.context_tokens / taken >= rate
    for citation, passage in zip(done.citations, retrieved.passages, strict=True):
        assert "".join(chunk.text for chunk in citation.chunks) == f" {passage.title} {passage.text}"
        assert citation.chunks[-1].end_token == citation.tokens


async def test_the_same_question_again_finds_everything_cached(client: BlockragClient, collection: str) -> None:
    options: Any = {"collection": collection, "top_k": 3, "max_tokens": 4, "compression": Compression(rate=3)}
    first = await client.ask(QUESTION, **options)
    again = await client.ask(QUESTION, **options)
    assert first.completion.usage.encoded_tokens > 0
    assert again.completion.usage.encoded_tokens == 0
    assert again.text == first.text
    without_slots = [[replace(each, slots=BlockSlots()) for each in one.completion.citations] for one in (first, again)]
    assert without_slots[0] == without_slots[1]
    assert sum(each.slots.encoded for each in again.completion.citations) == 0


@pytest.mark.parametrize("budget", [1, 20, 60, 100, 10_000])
async def test_a_token_budget_holds(client: BlockragClient, collection: str, budget: int) -> None:
    answer = await client.ask(
        QUESTION, collection=collection, top_k=6, max_tokens=4, compression=Compression(max_context_tokens=budget)
    )
    citations = answer.completion.citations
    assert slots(citations) <= budget
    for citation in citations:
        assert citation.in_prompt or "even compressed" in citation.dropped_reason
        assert citation.in_prompt or {chunk.form for chunk in citation.chunks} == {"dropped"}
    if budget == 1:
        assert not any(citation.in_prompt for citation in citations)
    if budget == 10_000:
        assert answer.completion.usage.compressed_chunks == 0


async def test_a_time_budget_is_kept_by_the_measured_cost_of_a_slot(client: BlockragClient, collection: str) -> None:
    status = (await client.describe()).decoder
    assert status["measured_prefills"] >= 9
    assert status["prefill_base_ms"] > 0
    generous = await client.ask(
        QUESTION, collection=collection, top_k=6, max_tokens=4, compression=Compression(max_ttft_ms=60_000)
    )
    assert generous.completion.usage.compressed_chunks == 0
    with pytest.raises(InvalidRequestError, match=r"compression\.max_ttft_ms.*the question without any passage"):
        await client.ask(QUESTION, collection=collection, compression=Compression(max_ttft_ms=0.01))


async def test_warming_builds_all_three_forms_and_a_purge_removes_them(client: BlockragClient, collection: str) -> None:
    before = await forms(client)
    steps = [step async for step in client.warm(collection=collection)]
    assert (steps[-1].done, steps[-1].hits) == (6, 0)
    warmed = await forms(client)
    assert set(warmed) >= set(FORMS)
    held = {form: warmed[form]["blocks"] - before.get(form, {"blocks": 0})["blocks"] for form in FORMS}
    # The instruction block is shared by all prompts: full, and there already unless this test runs first.
    assert held[FORMS[0]] in (6, 7)
    assert (held[FORMS[1]], held[FORMS[2]]) == (6, 6)
    assert warmed[FORMS[0]]["bytes"] > warmed[FORMS[1]]["bytes"] > warmed[FORMS[2]]["bytes"] > 0
    answer = await client.ask(
        QUESTION, collection=collection, top_k=6, max_tokens=2, compression=Compression(rate=3, policy="query")
    )
    assert answer.completion.usage.encoded_tokens == 0
    asked = await forms(client)
    for form in FORMS:
        assert asked[form]["misses"] == warmed[form]["misses"], form
        assert asked[form]["hits"] > warmed[form]["hits"], form
    assert (await forms(client))[FORMS[1]]["blocks"] >= 6
    again = [step async for step in client.warm(collection=collection)]
    assert (again[-1].hits, again[-1].encoded_bytes) == (6, 0)
    removed = await client.delete_document("Dorn.txt", collection=collection)
    assert removed.purged_blocks == 3
    purged = await forms(client)
    for form in FORMS:
        assert purged[form]["blocks"] == asked[form]["blocks"] - 1, form


async def test_the_compressor_forgets_what_was_purged(client: BlockragClient, collection: str) -> None:
    """Its own copy of the chunk embeddings follows the cache's purge."""
    text = "Gild of the hidden valley has nine mills and eleven bridges, and nobody else has ever heard of it at all."
    options: Any = {"collection": collection, "top_k": 1, "max_tokens": 2, "compression": Compression(rate=2)}

    async def misses() -> int:
        return (await forms(client))[FORMS[2]]["misses"]

    async def ask() -> None:
        await client.ingest_text("Gild.txt", text, collection=collection)
        await client.ask("Gild of the hidden valley?", **options)

    await ask()
    asked_once = await misses()
    await ask()
    assert await misses() == asked_once
    async with asyncio.timeout(10):
        while await misses() == asked_once:
            # It hears of a purge within about a second; until then its own copy serves.
            await client.delete_document("Gild.txt", collection=collection)
            await ask()


async def test_given_passages_are_compressed_too(client: BlockragClient) -> None:
    given = [
        GivenPassage(f"The capital of Utopia number {number} is Amaurot {number}.", "Utopia") for number in range(4)
    ]
    answer = await client.ask("What is the capital?", passages=given, max_tokens=4, compression=Compression(rate=2))
    assert answer.completion.usage.compressed_chunks > 0


GIVEN = tuple(
    Piece(town, f"{town} is a town on the river {town}a. It was founded in {1200 + 7 * number} and has {number} mills.")
    for number, town in enumerate(TOWNS)
)


async def test_what_evaluation_plans_and_answers_is_what_is_served(client: BlockragClient, cluster: Cluster) -> None:
    """For a grid of rates, policies and passages: the plan token for token, and the answer."""
    grid = list(itertools.product((1.5, 3.0, CHUNK_TOKENS), ("query", "blind", "retrieval"), (1, 4, 6)))

    def evaluated() -> list[tuple[PlanRequest, PlannedPrompt, str]]:
        bundle = configured_bundle(cluster.settings)
        with Reader(bundle, cluster.settings, max_answer_tokens=8) as reader:
            prompts = [Prompt(GIVEN[:count], QUESTION) for count in (1, 4, 6)]
            prompts += [
                Prompt(GIVEN[:count], QUESTION, compression=common_pb2.Compression(rate=rate, policy=policy))
                for rate, policy, count in grid
            ]
            planned = [reader.plan(prompt) for prompt in prompts]
            requests = [reader.plan_request(prompt) for prompt in prompts]
            return list(zip(requests, planned, reader.answer(planned), strict=True))

    async with grpc.aio.insecure_channel(cluster.target) as channel:
        compressor = CompressorServiceStub(channel)
        for request, planned, text in await asyncio.to_thread(evaluated):
            served = await compressor.Plan(request, metadata=(("application", "compressor"),))
            served.policy_ms = planned.plan.policy_ms = 0.0
            assert served == planned.plan
            asked = planned.prompt.compression
            answer = await client.ask(
                QUESTION,
                passages=[GivenPassage(piece.text, piece.title) for piece in planned.prompt.passages],
                max_tokens=8,
                compression=Compression(rate=asked.rate, policy=asked.policy) if asked is not None else None,
            )
            assert answer.text == text
            assert answer.completion.usage.prompt_tokens == planned.plan.prompt_tokens


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rate below 1": ({"compression": Compression(rate=0.5)}, r"compression\.rate"),
    "rate above k": ({"compression": Compression(rate=8.5)}, r"compression\.rate"),
    "rate is no number": ({"compression": Compression(rate=math.nan)}, r"compression\.rate"),
    "no tokens": ({"compression": Compression(max_context_tokens=0)}, r"compression\.max_context_tokens"),
    "no time": ({"compression": Compression(max_ttft_ms=0.0)}, r"compression\.max_ttft_ms"),
    "unknown policy": ({"compression": Compression(rate=2, policy="oracle")}, r"compression\.policy"),
    "full attention": ({"compression": Compression(rate=2), "attention_mode": "full"}, "compression: is possible"),
    "no passages": ({"compression": Compression(rate=2), "attention_mode": "none"}, "compression: is possible"),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_cannot_be_is_refused_by_name(client: BlockragClient, collection: str, case: str) -> None:
    options, named = BAD[case]
    with pytest.raises(InvalidRequestError, match=named):
        await client.ask(QUESTION, collection=collection, **options)


async def test_services_called_alone_name_what_is_wrong(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.target) as channel:
        blocks = [
            TokenBlock(key="k", token_ids=range(20, 40), form=form)
            for form in (BLOCK_FORM_FULL, BLOCK_FORM_COMPRESSED, BLOCK_FORM_CHUNKS)
        ]
        metadata = (("application", "encoder"),)
        encoded = await EncoderServiceStub(channel).EncodeBlocks(EncodeBlocksRequest(blocks=blocks), metadata=metadata)
        assert [block.slots for block in encoded.blocks] == [20, 3, 3]
        assert encoded.blocks[2].bytes == 3 * 64 * 4
        request = DecodeRequest(
            context=RequestContext(tenant="public"),
            blocks=[PromptBlock(token_ids=range(20, 40), forms=[CHUNK_FORM_COMPRESSED], chunk_tokens=CHUNK_TOKENS)],
            final_token_ids=[1],
            sampling=Sampling(max_tokens=1),
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            call = DecoderServiceStub(channel).Decode(request, metadata=(("application", "decoder"),))
            _ = [message async for message in call]
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "blocks[0].forms: holds 1, where 20 tokens have 3 chunks" in (refused.value.details() or "")
