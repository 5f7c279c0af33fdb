"""Plans with a real tiny bundle and embeddings that are encoded in process."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from blockrag.budget import composed_slots
from blockrag.compressor.compression_request import CompressionAbility, read_compression, sizes_decide
from blockrag.compressor.mixing import EmbeddingCache, Mixer
from blockrag.compressor.plans import Planner
from blockrag.compressor.rating import ChunkRater
from blockrag.errors import InvalidRequestError, PromptTooLongError
from blockrag.gateway.planning import decode_request
from blockrag.keys import KeyMaker
from blockrag.modeling.bundle import Bundle
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    ATTENTION_MODE_NONE,
    CHUNK_FORM_COMPRESSED,
    CHUNK_FORM_DROPPED,
    CHUNK_FORM_EXPANDED,
    Compression,
    Sampling,
    Turn,
)
from blockrag.v1.compressor_pb2 import PlanResponse
from tests.unit.compressor.planning import (
    CHUNK,
    TEXTS,
    Encoding,
    forms,
    make_planner,
    request,
    slots,
    tokens,
)


async def test_without_compression_nothing_is_asked_of_the_cache(planner: Planner, source: Encoding) -> None:
    with pytest.raises(StopIteration) as finished:
        planner.plan(request()).send(None)  # at once: the event loop is not given up
    plan: PlanResponse = finished.value.value
    assert source.fetched == []
    assert slots(plan) == tokens(plan)
    assert {form for passage in forms(plan) for form in passage} == {CHUNK_FORM_EXPANDED}
    assert not any(chunk.text for passage in plan.passages for chunk in passage.chunks)
    assert plan.chunk_tokens == CHUNK
    assert await planner.plan(request(Compression())) == plan


async def test_what_was_said_before_is_a_block_for_each_turn(planner: Planner, bundle: Bundle) -> None:
    said = [Turn(question="which city", answer="the largest"), Turn(question="when", answer="in the year")]
    alone = await planner.plan(request())
    plan = await planner.plan(request(turns=said, instructions="be brief"))
    tokenizer, template = bundle.load_tokenizer(), bundle.template
    assert [list(block.token_ids) for block in plan.turns] == [
        template.request_ids(tokenizer, "be brief"),
        *(template.turn_ids(tokenizer, turn.question, turn.answer) for turn in said),
    ]
    assert (plan.final_token_ids, plan.passages) == (alone.final_token_ids, alone.passages)
    before = sum(len(block.token_ids) for block in plan.turns)
    assert plan.prompt_tokens == alone.prompt_tokens + before
    decoded = decode_request(plan, Sampling(max_tokens=1), collection="c")
    assert list(decoded.blocks[-3:]) == list(plan.turns), "between the passages and the question"
    with pytest.raises(PromptTooLongError, match="conversation"):
        await planner.plan(request(turns=said * 200))


async def test_a_rate_is_reached_and_the_policy_sees_embeddings_from_the_cache(
    planner: Planner, source: Encoding
) -> None:
    plan = await planner.plan(request(Compression(rate=2)))
    assert tokens(plan) / slots(plan) >= 2
    chosen = {form for passage in forms(plan) for form in passage}
    assert chosen == {CHUNK_FORM_EXPANDED, CHUNK_FORM_COMPRESSED}
    assert [(block.document_id, block.collection, block.tenant, str(block.form)) for block in source.fetched] == [
        (f"d{place}", "c", "t", "chunks-4") for place in range(4)
    ]
    again = await planner.plan(request(Compression(rate=2)))
    assert len(source.fetched) == 4
    assert plan.policy_ms > 0
    assert forms(again) == forms(plan)


@pytest.mark.parametrize("compression", [Compression(rate=1), Compression(max_context_tokens=10_000)])
async def test_where_everything_fits_the_plan_is_the_one_without_compression(
    planner: Planner, source: Encoding, compression: Compression
) -> None:
    off, on = await planner.plan(request()), await planner.plan(request(compression))
    assert on.policy_ms == 0
    for passage in on.passages:
        for chunk in passage.chunks:
            chunk.ClearField("text")
    assert on == off
    assert source.fetched == []


async def test_the_highest_rate_compresses_everything_and_asks_no_policy(planner: Planner, source: Encoding) -> None:
    plan = await planner.plan(request(Compression(rate=CHUNK)))
    assert {form for passage in forms(plan) for form in passage} == {CHUNK_FORM_COMPRESSED}
    assert slots(plan) == sum(len(passage.chunks) for passage in plan.passages)
    assert source.fetched == []


async def test_retrieval_reads_the_best_passages_word_for_word(planner: Planner, source: Encoding) -> None:
    plan = await planner.plan(request(Compression(rate=2, policy="retrieval")))
    order = list(itertools.chain.from_iterable(forms(plan)))
    first = order.index(CHUNK_FORM_COMPRESSED)
    assert set(order[first:]) == {CHUNK_FORM_COMPRESSED}
    assert source.fetched == []


@pytest.mark.parametrize(
    "compression",
    [
        Compression(rate=CHUNK),
        Compression(rate=CHUNK, policy="query"),
        Compression(rate=2, policy="retrieval"),
        Compression(max_context_tokens=9, policy="retrieval"),
        Compression(max_context_tokens=60, policy="retrieval"),
    ],
)
async def test_what_sizes_decide_needs_no_mixer(bundle: Bundle, planner: Planner, compression: Compression) -> None:
    ability = CompressionAbility.of(bundle)
    assert sizes_decide(read_compression(compression, ATTENTION_MODE_BLOCK, ability), ability)
    assert await make_planner(bundle, None).plan(request(compression)) == await planner.plan(request(compression))


@pytest.mark.parametrize("compression", [Compression(rate=2), Compression(max_ttft_ms=500, policy="retrieval")])
async def test_what_sizes_do_not_decide_needs_one(bundle: Bundle, compression: Compression) -> None:
    ability = CompressionAbility.of(bundle)
    assert not sizes_decide(read_compression(compression, ATTENTION_MODE_BLOCK, ability), ability)
    with pytest.raises(ValueError, match="not decided by sizes"):
        await make_planner(bundle, None).plan(request(compression))


async def test_only_the_query_policy_sees_the_question(planner: Planner) -> None:
    async def chosen(policy: str, question: str) -> list[list[int]]:
        wanted = request(Compression(rate=2, policy=policy))
        wanted.question = question
        return forms(await planner.plan(wanted))

    questions = ("of the country", "in the year when", "Übergröße café", "x")
    assert len({str(await chosen("blind", question)) for question in questions}) == 1
    assert len({str(await chosen("query", question)) for question in questions}) > 1


async def test_a_time_becomes_slots_by_the_decoders_cost(planner: Planner) -> None:
    # 10 ms for the question, half a millisecond for each slot; the instruction block has one
    plan = await planner.plan(request(Compression(max_ttft_ms=35), spent_ms=5.0))
    assert slots(plan) <= 39
    assert slots(plan) > 39 - CHUNK
    with pytest.raises(InvalidRequestError, match="the question without any passage takes about 16 ms"):
        await planner.plan(request(Compression(max_ttft_ms=14), spent_ms=5.0))


async def test_the_policys_own_time_is_no_slots_and_where_it_takes_too_much_retrieval_chooses(
    planner: Planner, source: Encoding
) -> None:
    await planner.plan(request(Compression(rate=2)))
    assert planner.mixer is not None
    times = planner.mixer._times
    chunks = sum(len(passage.chunks) for passage in (await planner.plan(request())).passages)
    limit = 10 + (chunks + 41) / 2  # room for every chunk compressed, and forty slots more
    free = await planner.plan(request(Compression(max_ttft_ms=limit, policy="retrieval")))
    for _ in range(20):
        times.record(10.0, chunks)
    asked = await planner.plan(request(Compression(max_ttft_ms=limit)))
    assert asked.policy_ms > 0
    assert slots(free) - 20 - CHUNK <= slots(asked) <= slots(free) - 20 + CHUNK
    for _ in range(20):
        times.record(1000.0, chunks)
    hurried = await planner.plan(request(Compression(max_ttft_ms=limit)))
    assert hurried == free


async def test_what_does_not_fit_even_compressed_is_dropped_the_worst_first(planner: Planner) -> None:
    plan = await planner.plan(request(Compression(max_context_tokens=20)))
    assert slots(plan) <= 20
    assert plan.passages[0].in_prompt
    dropped = [passage for passage in plan.passages if not passage.in_prompt]
    assert dropped
    for passage in dropped:
        assert "even compressed" in passage.dropped_reason
        assert {chunk.form for chunk in passage.chunks} == {CHUNK_FORM_DROPPED}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(1, 300), bound=st.integers(0, 200), policy=st.sampled_from(["query", "blind", "retrieval"]))
async def test_no_plan_is_over_its_budget(planner: Planner, budget: int, bound: int, policy: str) -> None:
    compression = Compression(max_context_tokens=budget, policy=policy)
    plan = await planner.plan(request(compression, max_context_tokens=bound))
    assert slots(plan) <= (min(budget, bound) if bound else budget)


async def test_the_words_of_the_chunks_are_the_passage(planner: Planner) -> None:
    plan = await planner.plan(request(Compression(rate=3)))
    for passage, text in zip(plan.passages, TEXTS, strict=True):
        assert "".join(chunk.text for chunk in passage.chunks) == f" title {text}"
        assert [chunk.start_token for chunk in passage.chunks] == list(range(0, len(passage.token_ids), CHUNK))


async def test_a_plan_does_not_change_the_next_one_of_the_same_passages(planner: Planner) -> None:
    bounded, whole = Compression(max_context_tokens=20), Compression(rate=1)
    first = [await planner.plan(request(each)) for each in (None, bounded, whole)]
    again = [await planner.plan(request(each)) for each in (whole, bounded, None)]
    for plan in (*first, *again):
        plan.policy_ms = 0.0
    assert first == again[::-1]
    dropped = await planner.plan(request(max_context_tokens=1))
    assert CHUNK_FORM_DROPPED in forms(dropped)[0]
    assert await planner.plan(request()) == first[0]


async def test_slots_are_counted_as_the_decoder_counts_them(planner: Planner) -> None:
    for rate in (1.0, 1.3, 2.0, 3.0, CHUNK):
        plan = await planner.plan(request(Compression(rate=rate)))
        expanded = [[form == CHUNK_FORM_EXPANDED for form in passage] for passage in forms(plan)]
        assert slots(plan) == sum(
            composed_slots([len(passage.token_ids)], keep, CHUNK)
            for passage, keep in zip(plan.passages, expanded, strict=True)
        )


async def test_no_passages_and_modes_without_blocks(planner: Planner) -> None:
    empty = request(Compression(rate=2))
    empty.ClearField("passages")
    assert (await planner.plan(empty)).passages == []
    with pytest.raises(InvalidRequestError, match="attention_mode block only"):
        await planner.plan(request(Compression(rate=2), attention_mode=ATTENTION_MODE_NONE))


async def test_a_question_that_does_not_fit_is_refused_before_anything_is_fetched(
    planner: Planner, source: Encoding
) -> None:
    with pytest.raises(PromptTooLongError):
        await planner.plan(request(Compression(rate=2), max_tokens=5000))
    assert source.fetched == []


async def test_a_prepared_question_is_embedded_once(bundle: Bundle, source: Encoding) -> None:
    rater = ChunkRater.load(bundle)
    rater.warm_up()
    embedded: list[int] = []
    embed = rater.embed_question

    def counted(question: Sequence[int]) -> Tensor:
        embedded.append(len(question))
        return embed(question)

    rater.embed_question = counted  # type: ignore[method-assign]
    keys = KeyMaker(bundle.fingerprint, b"secret", bundle.compression_fingerprint)
    mixer = Mixer(CHUNK, rater, EmbeddingCache(source, 2**20), keys)
    planner = make_planner(bundle, mixer)
    question = request().question
    unprepared = await planner.plan(request(Compression(rate=2)))
    await asyncio.gather(planner.prepare("another"), planner.prepare("another"), planner.prepare(question))
    assert forms(await planner.plan(request(Compression(rate=2)))) == forms(unprepared)
    assert len(embedded) == 2
    await planner.plan(request(Compression(rate=2, policy="blind")))
    assert len(embedded) == 2


@pytest.mark.parametrize("policy", ["query", "blind"])
async def test_policies_rate_in_a_thread_of_their_own(bundle: Bundle, source: Encoding, policy: str) -> None:
    """They take milliseconds, which other plans of the event loop must not wait for."""
    rater = ChunkRater.load(bundle)
    rate = rater.rate
    threads: list[threading.Thread] = []

    def watched(*given: Any) -> NDArray[np.float32]:
        threads.append(threading.current_thread())
        return rate(*given)

    rater.rate = watched  # type: ignore[method-assign]
    keys = KeyMaker(bundle.fingerprint, b"secret", bundle.compression_fingerprint)
    mixer = Mixer(CHUNK, rater, EmbeddingCache(source, 2**20), keys)
    await make_planner(bundle, mixer).plan(request(Compression(rate=2, policy=policy)))
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_a_bundle_that_cannot_compress_prepares_nothing(plain: Bundle) -> None:
    planner = make_planner(plain, None)
    before = await planner.plan(request())
    await planner.prepare(request().question)
    assert await planner.plan(request()) == before
