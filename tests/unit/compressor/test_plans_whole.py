"""Plans that read passages whole, or sentences of them: by rank, by a time, by what a question seems to need."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockrag.compressor.compression_request import read_compression, sizes_decide
from blockrag.errors import InvalidRequestError
from blockrag.gateway.planning import decode_request
from blockrag.modeling.bundle import Bundle
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    CHUNK_FORM_DROPPED,
    CHUNK_FORM_EXPANDED,
    Compression,
    Passage,
    Sampling,
)
from blockrag.v1.compressor_pb2 import PlanRequest
from tests.unit.compressor.planning import (
    Decoder,
    make_planner,
    request,
    slots,
)


async def test_without_a_chunk_encoder_the_best_passages_stay_whole(plain: Bundle) -> None:
    planner = make_planner(plain, None)
    everything = await planner.plan(request())
    sizes = [len(passage.token_ids) for passage in everything.passages]
    assert everything.chunk_tokens == plain.chunk_tokens and all(passage.in_prompt for passage in everything.passages)

    halved = await planner.plan(request(Compression(rate=2)))

    kept = [passage.in_prompt for passage in halved.passages]
    used = sum(size for size, stays in zip(sizes, kept, strict=True) if stays)
    assert kept[0] and not all(kept) and used <= max(sum(sizes) / 2, sizes[0])
    assert {chunk.form for passage in halved.passages for chunk in passage.chunks} <= {
        CHUNK_FORM_EXPANDED,
        CHUNK_FORM_DROPPED,
    }
    dropped = [passage.dropped_reason for passage in halved.passages if not passage.in_prompt]
    assert all("read whole or not at all" in reason for reason in dropped)
    most = Compression(rate=plain.chunk_tokens)
    assert (await planner.plan(request(most))).passages[0].in_prompt
    none = await planner.plan(request(Compression(max_context_tokens=1)))
    assert not any(passage.in_prompt for passage in none.passages)
    with pytest.raises(InvalidRequestError, match="the bundle has sentences, retrieval"):
        await planner.plan(request(Compression(rate=2, policy="query")))


@pytest.mark.parametrize("policy", ["retrieval", "sentences"])
async def test_a_time_becomes_whole_passages_where_there_is_no_chunk_encoder(plain: Bundle, policy: str) -> None:
    planner = make_planner(plain, None, Decoder())
    for milliseconds in (16, 30, 60, 90, 500):
        # 10 ms for the question, half a millisecond for each slot, 5 ms elsewhere; the instruction block has one
        left = int((milliseconds - 5 - 10) / 0.5) - 1
        timed = await planner.plan(request(Compression(max_ttft_ms=milliseconds, policy=policy), spent_ms=5.0))
        same = await planner.plan(request(Compression(max_context_tokens=max(1, left), policy=policy)))
        timed.expected_ms = 0.0
        for passage in (*timed.passages, *same.passages):
            passage.dropped_reason = ""  # of time, or of tokens
            if not passage.in_prompt:
                passage.ClearField("chunks")  # as sentences, or one
        assert timed == same
        assert slots(timed) <= left
    with pytest.raises(InvalidRequestError, match="the question without any passage takes about 16 ms"):
        await planner.plan(request(Compression(max_ttft_ms=14), spent_ms=5.0))
    with pytest.raises(ValueError, match="not decided by sizes"):
        await make_planner(plain, None).plan(request(Compression(max_ttft_ms=90)))


SEVERAL = (
    ("Norway", "Norway is a country. Its capital is Oslo. The king lives there. Trolls live in the north."),
    ("Fiji", "Fiji is warm. Sugar grows on the islands. The capital of Fiji is Suva."),
)


def about(question: str, compression: Compression, passages: Sequence[tuple[str, str]] = SEVERAL) -> PlanRequest:
    asked = request(compression)
    asked.question = question
    asked.ClearField("passages")
    asked.passages.extend(
        Passage(passage_id=title, document_id=title, title=title, text=text) for title, text in passages
    )
    return asked


@pytest.mark.parametrize("compresses", [False, True])
async def test_a_question_reads_what_it_seems_to_need(plain: Bundle, bundle: Bundle, compresses: bool) -> None:
    planner = make_planner(bundle if compresses else plain, None)

    async def read(question: str) -> list[str]:
        plan = await planner.plan(about(question, Compression(auto=True)))
        assert all(bool(passage.dropped_reason) != passage.in_prompt for passage in plan.passages)
        in_prompt = [passage for passage in plan.passages if passage.in_prompt]
        assert slots(plan) == sum(len(passage.token_ids) for passage in in_prompt)
        blocks = decode_request(plan, Sampling(max_tokens=4)).blocks
        assert not any(block.kept or block.forms for block in blocks)
        return [passage.document_id for passage in in_prompt]

    assert await read("Where do trolls live?") == ["Norway"]
    assert await read("What is the capital of Fiji?") == ["Norway", "Fiji"]  # the first is read in any case
    assert await read("Why?") == ["Norway", "Fiji"]  # no word says which
    # Norway shares more of it; Fiji alone has the sugar
    assert await read("Where do trolls live in the north of Norway, and where does sugar grow?") == ["Norway", "Fiji"]


GERMAN = (
    ("Miete", "Die Miete wird monatlich bezahlt. Die Heizung ist in der Miete."),
    ("Hof", "Der Hof ist groß. Die Kinder spielen dort."),
    ("Kündigung", "Eine Kündigung wird geschrieben. Sie wird unterschrieben. Frist: drei Monate."),
)


@pytest.mark.parametrize(("language", "read"), [("german", ["Miete", "Kündigung"]), ("", ["Miete", "Hof"])])
async def test_words_are_those_of_the_collections_language(plain: Bundle, language: str, read: list[str]) -> None:
    """Inflected words share a stem, and die is no word that says what is asked for, in German only."""
    planner = make_planner(plain, None)
    asked = about("Wie lang sind die Fristen der Kündigungen?", Compression(auto=True), GERMAN)
    asked.language = language
    plan = await planner.plan(asked)
    assert [passage.document_id for passage in plan.passages if passage.in_prompt] == read

    asked.compression.CopyFrom(Compression(max_context_tokens=60, policy="sentences"))
    plan = await planner.plan(asked)
    texts = [chunk.text for one in plan.passages for chunk in one.chunks if chunk.form == CHUNK_FORM_EXPANDED]
    assert ("Frist: drei Monate." in texts) == (language == "german"), texts


async def test_sentences_are_taken_out_of_cached_blocks_if_asked(plain: Bundle) -> None:
    planner = make_planner(plain, None)
    asked = about("What is the capital of Fiji?", Compression(rate=3, policy="sentences"))
    everything, third = await planner.plan(about(asked.question, Compression())), await planner.plan(asked)
    sizes = [len(passage.token_ids) for passage in everything.passages]
    norway, fiji = third.passages
    read = "".join(chunk.text for chunk in fiji.chunks if chunk.form == CHUNK_FORM_EXPANDED)
    assert fiji.in_prompt and "The capital of Fiji is Suva." in read and "Sugar" not in read
    taken = sum(
        chunk.end_token - chunk.start_token
        for passage in third.passages
        for chunk in passage.chunks
        if chunk.form == CHUNK_FORM_EXPANDED
    )
    assert third.prompt_tokens - (everything.prompt_tokens - sum(sizes)) == taken
    assert 0 < taken <= sum(sizes) / 3 or len([c for c in fiji.chunks if c.form == CHUNK_FORM_EXPANDED]) == 2
    assert norway.in_prompt == any(chunk.form == CHUNK_FORM_EXPANDED for chunk in norway.chunks)
    assert bool(norway.dropped_reason) == (not norway.in_prompt)

    blocks = decode_request(third, Sampling(max_tokens=4)).blocks
    assert [block.document_id for block in blocks if block.kept] == [
        passage.document_id for passage in third.passages if passage.in_prompt
    ]
    (kept,) = [block for block in blocks if block.document_id == "Fiji"]
    assert list(kept.token_ids) == list(fiji.token_ids)  # the whole block, as it is cached
    assert sum(span.end - span.start for block in blocks for span in block.kept) == taken
    assert not sizes_decide(read_compression(asked.compression, ATTENTION_MODE_BLOCK, planner.ability), planner.ability)


async def test_slots_that_are_too_few_for_any_sentence_leave_all_out(plain: Bundle) -> None:
    planner = make_planner(plain, None)
    none = await planner.plan(about("Where?", Compression(max_context_tokens=3, policy="sentences")))
    assert not any(passage.in_prompt for passage in none.passages)
    assert all("over the token budget" in passage.dropped_reason for passage in none.passages)
    asked = about("Where?", Compression(rate=4, policy="sentences"))
    asked.max_context_tokens = 3
    assert not any(passage.in_prompt for passage in (await planner.plan(asked)).passages)
    asked.max_context_tokens = 0
    assert [passage.in_prompt for passage in (await planner.plan(asked)).passages].count(True) == 1


async def test_a_rate_of_one_leaves_nothing_out(plain: Bundle) -> None:
    planner = make_planner(plain, None)
    everything = await planner.plan(about("Where?", Compression()))
    whole = await planner.plan(about("Where?", Compression(rate=1, policy="sentences")))
    assert whole.prompt_tokens == everything.prompt_tokens
    assert all(chunk.form == CHUNK_FORM_EXPANDED for passage in whole.passages for chunk in passage.chunks)
    assert not any(block.kept for block in decode_request(whole, Sampling(max_tokens=4)).blocks)
