"""Every refusal names its field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from blockrag.compressor.compression_request import CompressionAbility, CompressionRequest
from blockrag.errors import InvalidRequestError, SettingsError
from blockrag.gateway import validation
from blockrag.settings import GatewaySettings
from blockrag.v1 import common_pb2, corpus_pb2
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_FULL,
    ATTENTION_MODE_NONE,
    Compression,
    MetadataCondition,
    Turn,
)
from blockrag.v1.rag_pb2 import GenerateRequest, GivenPassage, RetrieveRequest

LIMITS = GatewaySettings(max_top_k=100, default_top_k=5, default_max_tokens=48, max_timeout_ms=10_000)
ABILITY = CompressionAbility("reader", 8, frozenset({"query"}))
IN = common_pb2.CONDITION_OPERATOR_IN
AT_LEAST = common_pb2.CONDITION_OPERATOR_AT_LEAST


def text(value: str) -> Value:
    return Value(string_value=value)


def number(value: float) -> Value:
    return Value(number_value=value)


def condition(**fields: Any) -> list[MetadataCondition]:
    return [MetadataCondition(**fields)]


def test_defaults_are_filled_in() -> None:
    question = validation.check_generate(GenerateRequest(question=" Where? "), LIMITS, ABILITY)
    assert question.text == "Where?"
    assert question.collection == "default"
    assert question.top_k == 5
    assert question.attention_mode == common_pb2.ATTENTION_MODE_BLOCK
    assert question.timeout_ms == 10_000
    assert question.max_context_tokens == 0
    assert question.sampling.max_tokens == 48
    assert question.sampling.temperature == 0.0
    assert question.sampling.top_p == 1.0
    assert 0 <= question.sampling.seed < 2**53


def test_compression_is_checked_against_the_bundle() -> None:
    asked = Compression(rate=4, policy="retrieval")
    read = CompressionRequest("rate", 4.0, "retrieval")
    question = validation.check_generate(GenerateRequest(question="q", compression=asked), LIMITS, ABILITY)
    assert question.compression == read and read.to_message() == asked
    off = GenerateRequest(question="q", compression=Compression())
    assert validation.check_generate(off, LIMITS, ABILITY).compression is None
    plain = CompressionAbility("plain", 8, None)
    whole = validation.check_generate(GenerateRequest(question="q", compression=asked), LIMITS, plain)
    assert whole.compression == read and not whole.needs_compressor
    named = GenerateRequest(question="q", compression=Compression(rate=4, policy="sentences"))
    by_sentences = validation.check_generate(named, LIMITS, plain)
    assert by_sentences.compression == CompressionRequest("rate", 4.0, "sentences") and by_sentences.needs_compressor
    timed = GenerateRequest(question="q", compression=Compression(max_ttft_ms=100))
    assert validation.check_generate(timed, LIMITS, plain).needs_compressor


def test_what_is_given_is_kept() -> None:
    request = GenerateRequest(
        question="q",
        collection="almanac",
        top_k=7,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=2**63,
        stop=["\n"],
        timeout_ms=500,
        filter=condition(key="year", operator=AT_LEAST, values=[number(1990)]),
    )
    question = validation.check_generate(request, LIMITS, ABILITY)
    assert question.collection == "almanac"
    assert question.top_k == 7
    assert question.sampling.seed == 2**63
    assert list(question.sampling.stop) == ["\n"]
    assert question.timeout_ms == 500
    assert question.filter[0].key == "year"


def test_two_questions_draw_different_seeds() -> None:
    seeds = {validation.check_generate(GenerateRequest(question="q"), LIMITS, ABILITY).sampling.seed for _ in range(8)}
    assert len(seeds) == 8


def test_a_longer_timeout_than_the_servers_is_shortened() -> None:
    assert (
        validation.check_generate(GenerateRequest(question="q", timeout_ms=99_999_999), LIMITS, ABILITY).timeout_ms
        == 10_000
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"question": ""}, "question"),
    ({"question": " \n\t"}, "question"),
    ({"question": "x" * 2**20}, "question"),
    ({"question": "nul \x00"}, "question"),
    ({"question": "escape \x1b[31m"}, "question"),
    ({"question": "c1 \x85"}, "question"),
    ({"collection": "../etc"}, "collection"),
    ({"collection": "a" * 65}, "collection"),
    ({"collection": "-a"}, "collection"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 101}, "top_k"),
    ({"top_k": 10_000}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"stop": ["a"] * 9}, "stop"),
    ({"stop": ["ok", ""]}, "stop[1]"),
    ({"stop": ["x" * 65]}, "stop[0]"),
    ({"timeout_ms": 0}, "timeout_ms"),
    ({"max_context_tokens": 0}, "max_context_tokens"),
    ({"attention_mode": 17}, "attention_mode"),
    ({"passages": [GivenPassage(text="")]}, "passages[0].text"),
    ({"passages": [GivenPassage(text="a"), GivenPassage(text=" ")]}, "passages[1].text"),
    ({"passages": [GivenPassage(text="a\x00")]}, "passages[0].text"),
    ({"passages": [GivenPassage(text="a" * 65_537)]}, "passages[0].text"),
    ({"passages": [GivenPassage(text="a", title="b\nc")]}, "passages[0].title"),
    ({"passages": [GivenPassage(text="a")] * 101}, "passages"),
    ({"passages": [GivenPassage(text="a" * 60_000)] * 5}, "passages"),
    ({"passages": [GivenPassage(text="a")], "attention_mode": common_pb2.ATTENTION_MODE_NONE}, "passages"),
    ({"turns": [Turn(question="a")] * 129}, "turns"),
    ({"turns": [Turn(question="a" * 200_000, answer="b" * 100_000)]}, "turns"),
    ({"turns": [Turn(question="a", answer="b"), Turn(question=" ", answer="b")]}, "turns[1].question"),
    ({"turns": [Turn(question="a", answer="b\x00")]}, "turns[0].answer"),
    ({"instructions": "a\x00"}, "instructions"),
    ({"filter": condition(operator=IN, values=[text("a")])}, "filter[0].key"),
    ({"filter": condition(key="a\x00", operator=IN, values=[text("a")])}, "filter[0].key"),
    ({"filter": condition(key="a", values=[text("a")])}, "filter[0].operator"),
    ({"filter": condition(key="a", operator=99, values=[text("a")])}, "filter[0].operator"),
    ({"filter": condition(key="a", operator=IN)}, "filter[0].values"),
    ({"filter": condition(key="a", operator=IN, values=[text("a")] * 257)}, "filter[0].values"),
    ({"filter": condition(key="a", operator=IN, values=[number(2**60)])}, "filter[0].values[0]"),
    ({"filter": condition(key="a", operator=IN, values=[Value(null_value=0)])}, "filter[0].values"),
    ({"filter": condition(key="a", operator=IN, values=[Value()])}, "filter[0].values"),
    ({"filter": condition(key="a", operator=IN, values=[number(math.nan)])}, "filter[0].values[0]"),
    ({"filter": condition(key="a", operator=AT_LEAST, values=[text("a")])}, "filter[0].values"),
    ({"filter": condition(key="a", operator=AT_LEAST, values=[number(1), number(2)])}, "filter[0].values"),
    ({"filter": condition(key="a", operator=IN, values=[text("a")]) * 33}, "filter"),
]


@pytest.mark.parametrize(("fields", "field"), BAD, ids=[f"{field}-{index}" for index, (_, field) in enumerate(BAD)])
def test_bad_questions(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validation.check_generate(GenerateRequest(**{"question": "q", **fields}), LIMITS, ABILITY)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (RetrieveRequest(query=""), "query"),
        (RetrieveRequest(query="q", top_k=0), "top_k"),
        (RetrieveRequest(query="q", top_k=101), "top_k"),
        (RetrieveRequest(query="q", collection="a b"), "collection"),
    ],
)
def test_bad_searches(request_: RetrieveRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validation.check_retrieve(request_, LIMITS)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (corpus_pb2.DocumentHeader(), "document_id"),
        (corpus_pb2.DocumentHeader(document_id="a" * 513), "document_id"),
        (corpus_pb2.DocumentHeader(document_id="a\nb"), "document_id"),
        (corpus_pb2.DocumentHeader(document_id="a", collection="ü"), "collection"),
        (corpus_pb2.DocumentHeader(document_id="a", title="x\x00"), "title"),
        (corpus_pb2.DocumentHeader(document_id="a", metadata=Struct(fields={"": text("x")})), "metadata"),
    ],
)
def test_bad_headers(header: corpus_pb2.DocumentHeader, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validation.check_header(header)
    assert refused.value.field == field


def test_a_header_gets_its_collection_and_is_not_changed_in_place() -> None:
    header = corpus_pb2.DocumentHeader(document_id="a.txt", title="A")
    assert validation.check_header(header).collection == "default"
    assert header.collection == ""


@pytest.mark.parametrize(
    "check",
    [
        lambda: validation.check_page_size(501),
        lambda: validation.check_trace_id("xyz"),
        lambda: validation.check_trace_id("a" * 31),
        lambda: validation.check_document_ids([""]),
        lambda: validation.check_document_ids(["a"] * 10_001),
    ],
)
def test_other_fields(check: Callable[[], object]) -> None:
    with pytest.raises(InvalidRequestError):
        check()


def test_repeated_ids_count_once() -> None:
    assert validation.check_document_ids(["b", "a", "b"]) == ("b", "a")


@given(st.text(max_size=200))
def test_any_text_is_taken_or_refused_by_name(value: str) -> None:
    try:
        checked = validation.check_question("question", value, 100)
    except InvalidRequestError as refused:
        assert refused.field == "question"
    else:
        assert checked
        assert checked == checked.strip()
        assert len(checked) <= 100
        assert "\x00" not in checked


def test_equal_text_is_equal_whoever_typed_it() -> None:
    """Rows C3 and C4: questions, earlier turns, instructions, filters, ids, titles, given passages."""
    typed, right = "Pru\u0308f\u00adung\u200b", "Prüfung"
    request = GenerateRequest(
        question=f"\ufeff{typed}?",
        filter=condition(key=typed, operator=IN, values=[text(typed)]),
        passages=[GivenPassage(title=typed, text=typed)],
    )
    question = validation.check_generate(request, LIMITS, ABILITY)

    assert question.text == f"{right}?"
    assert (question.filter[0].key, question.filter[0].values[0].string_value) == (right, right)
    assert (question.given[0].title, question.given[0].text) == (right, right)
    assert validation.check_retrieve(RetrieveRequest(query=typed), LIMITS).query == right
    said = GenerateRequest(question="q", turns=[Turn(question=typed, answer=typed)], instructions=typed)
    before = validation.check_generate(said, LIMITS, ABILITY)
    assert (before.turns[0].question, before.turns[0].answer, before.instructions) == (right, right, right)
    header = validation.check_header(corpus_pb2.DocumentHeader(document_id=typed, title=typed))
    assert (header.document_id, header.title) == (right, right)
    assert validation.read_document_id(typed) == right
    assert validation.check_document_ids([typed, right]) == (right,)


def test_what_cannot_be_seen_is_empty() -> None:
    """Section D."""
    for request in (
        GenerateRequest(question="\u200b\u200d"),
        GenerateRequest(question="q", passages=[GivenPassage(text="\u200d")]),
    ):
        with pytest.raises(InvalidRequestError, match="must not be empty"):
            validation.check_generate(request, LIMITS, ABILITY)
    with pytest.raises(InvalidRequestError, match="document_id"):
        validation.read_document_id("\u200b")


def test_the_settings_say_how_small_where_the_request_does_not() -> None:
    plain = CompressionAbility("plain", 8, None)

    def read(rate: Any, **fields: Any) -> CompressionRequest | None:
        limits = GatewaySettings(default_rate=rate)
        return validation.check_generate(GenerateRequest(question="q", **fields), limits, plain).compression

    assert read(1) is None
    assert read("auto") == CompressionRequest("auto", 0.0, "retrieval")
    assert read(4) == CompressionRequest("rate", 4.0, "retrieval")
    assert read("auto", compression=Compression(rate=1)) is None
    assert read("auto", compression=Compression()) is None
    for mode in (ATTENTION_MODE_FULL, ATTENTION_MODE_NONE):
        assert read("auto", attention_mode=mode) is None
    validation.check_default_rate(GatewaySettings(default_rate=8), plain)
    with pytest.raises(SettingsError, match=r"gateway\.default_rate is 9; must be from 1 to 8"):
        validation.check_default_rate(GatewaySettings(default_rate=9), plain)
