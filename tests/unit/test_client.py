"""The client against a real gRPC server on this machine, whose answers are written by hand."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockrag.client import BlockragClient
from blockrag.errors import (
    BlockragError,
    DataError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    SettingsError,
    SetupError,
    UnauthenticatedError,
    UnavailableError,
)
from blockrag.results import (
    CitedChunk,
    Collection,
    Completion,
    Compression,
    Condition,
    DeletedCollection,
    DeletedDocument,
    DeletedSource,
    GivenPassage,
    IngestedDocument,
    Retrieved,
    TextChunk,
)
from blockrag.status import LOST_STATUS, error_of, status_code
from blockrag.traceparent import span_id_of, trace_id_of
from blockrag.v1 import common_pb2
from tests.unit.handwritten_server import KEY, Server, serving


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    servicer = Server()
    async with serving(servicer) as address:
        yield servicer, address


@pytest.fixture
async def client(server: tuple[Server, str]) -> AsyncIterator[BlockragClient]:
    async with BlockragClient(server[1], KEY, timeout_s=10, patience_s=1.0) as connected:
        yield connected


async def test_the_events_of_an_answer(client: BlockragClient) -> None:
    events = [event async for event in client.generate("Where?")]
    assert [type(event) for event in events] == [Retrieved, TextChunk, TextChunk, Completion]
    retrieved, first, second, done = events
    assert isinstance(retrieved, Retrieved)
    assert retrieved.passages[0].metadata == {"year": 1999}
    assert isinstance(first, TextChunk)
    assert first + second == "Oslo"  # type: ignore[operator]
    assert first.tokens == 2
    assert isinstance(done, Completion)
    assert done.answer == "Oslo"
    assert done.citations[0].chunks == (CitedChunk(0, 8, "expanded"), CitedChunk(8, 9, "compressed", " Oslo"))
    assert (done.usage.context_tokens, done.usage.compressed_chunks) == (9, 1)
    assert done.stages_ms == {"total": 12.5}
    assert done.finish_reason == "end"
    assert done.attention_mode == "full"
    assert done.request_id == "r1"


async def test_metadata_and_deadline_travel(client: BlockragClient, server: tuple[Server, str]) -> None:
    answer = await client.ask("Where?", timeout_s=5)
    metadata = server[0].metadata
    assert metadata["application"] == "gateway"
    assert metadata["authorization"] == f"Bearer {KEY}"
    assert trace_id_of(metadata["traceparent"]) == answer.completion.trace_id
    assert server[0].requests[0].timeout_ms == 5000
    assert answer.text == "Oslo"
    assert answer.client_time_to_first_token_ms > 0


async def test_options_of_a_question(client: BlockragClient, server: tuple[Server, str]) -> None:
    await client.ask(
        "Where?",
        collection="almanac",
        top_k=0,
        filter={"kind": "country", "year": 1999, "open": True},
        attention_mode="none",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=0,
        stop=["\n"],
        max_context_tokens=100,
        passages=[GivenPassage("text", title="T")],
    )
    request = server[0].requests[0]
    assert request.collection == "almanac"
    assert request.HasField("top_k")
    assert request.top_k == 0
    assert request.HasField("seed")
    assert request.attention_mode == common_pb2.ATTENTION_MODE_NONE
    kinds = [condition.values[0].WhichOneof("kind") for condition in request.filter]
    assert kinds == ["string_value", "number_value", "bool_value"]
    assert request.passages[0].title == "T"
    await client.ask("Where?")
    assert not server[0].requests[1].HasField("top_k")
    assert not server[0].requests[1].HasField("seed")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Compression(rate=4), common_pb2.Compression(rate=4)),
        (
            Compression(max_context_tokens=100, policy="blind"),
            common_pb2.Compression(max_context_tokens=100, policy="blind"),
        ),
        (Compression(max_ttft_ms=50.5), common_pb2.Compression(max_ttft_ms=50.5)),
        (Compression(rate="auto"), common_pb2.Compression(auto=True)),
    ],
)
async def test_compression_of_a_question(
    client: BlockragClient, server: tuple[Server, str], wanted: Compression, message: common_pb2.Compression
) -> None:
    await client.ask("Where?", compression=wanted)
    assert server[0].requests[0].compression == message
    await client.ask("Where?")
    assert not server[0].requests[1].HasField("compression")


async def test_a_conversation(client: BlockragClient, server: tuple[Server, str]) -> None:
    await client.ask("Since when?", turns=[("Where?", "Oslo.")], instructions="Be brief.")
    (asked,) = server[0].requests
    assert list(asked.turns) == [common_pb2.Turn(question="Where?", answer="Oslo.")]
    assert asked.instructions == "Be brief."
    with pytest.raises(InvalidRequestError):
        await client.ask("Since when?", turns=["Where?"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "top_k"),
        ({"top_k": "five"}, "top_k"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"attention_mode": "sparse"}, "attention_mode"),
        ({"stop": [5]}, "request"),
        ({"compression": Compression()}, "compression"),
        ({"compression": Compression(rate=2, max_ttft_ms=50)}, "compression"),
        ({"compression": Compression(max_context_tokens=-1)}, "compression.max_context_tokens"),
        ({"compression": Compression(rate="four")}, "compression.rate"),
    ],
)
async def test_what_no_message_can_hold_is_refused_here(
    client: BlockragClient, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await client.ask("Where?", **options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"kind": [["a"]]}, "value of 'kind' is a list"),
        ({"kind": None}, "value of 'kind' is a NoneType"),
        ({"ticket": 1234567890123456788}, "too large.*send it as text"),
        ({"price": float("nan")}, "'price' is nan"),
        ([Condition("k", "between", (1,))], "operator 'between'"),  # type: ignore[arg-type]
        (["kind=a"], "holds a str"),
    ],
)
async def test_filters_that_cannot_be_are_refused_here(client: BlockragClient, filter: Any, message: str) -> None:
    """Rows A7 and B10."""
    with pytest.raises(InvalidRequestError, match=message) as refused:
        await client.retrieve("q", filter=filter)
    assert refused.value.field == "filter"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.ingest_text("x", "a \udce9"), "content"),
        (lambda client: client.ingest_text("x", "a", source="\udce9"), "source"),
        (lambda client: client.retrieve("a \udce9"), "query"),
        (lambda client: client.retrieve("a", filter={"\udce9": 1}), "key"),
        (lambda client: client.retrieve("a", filter={"k": ["\udce9"]}), "string_value"),
        (lambda client: client.ask("a \udce9"), "question"),
        (lambda client: client.ask("a", turns=[("b", "\udce9")]), "answer"),
        (lambda client: client.ask("a", passages=[GivenPassage("\udce9")]), "text"),
        (lambda client: client.ask("a", stop="\udce9"), "request"),
        (lambda client: client.delete_document("\udce9"), "document_id"),
        (lambda client: client.delete_source("\udce9"), "source"),
        (lambda client: anext(client.list_documents(collection="\udce9")), "collection"),
    ],
)
async def test_what_is_no_text_is_refused_here(client: BlockragClient, call: Any, field: str) -> None:
    """Rows B3 and B4, from Python: half of a surrogate pair is what a name that is not UTF-8 is read as."""
    with pytest.raises(InvalidRequestError) as refused:
        await call(client)
    assert refused.value.field == field
    str(refused.value).encode()


async def test_a_file_that_cannot_be_read_to_its_end_says_why(client: BlockragClient) -> None:
    """Row B3: opens, as the memory of a process does, and fails when it is read."""
    with pytest.raises(OSError, match="Input/output error"):
        await client.ingest_file("/proc/self/mem", document_id="x.txt")


async def test_a_list_as_the_value_of_a_filter_is_any_of_it(client: BlockragClient, server: tuple[Server, str]) -> None:
    """Row B10."""
    await client.retrieve("q", filter={"kind": ["country", "city"]})
    (condition,) = server[0].requests[0].filter
    assert [value.string_value for value in condition.values] == ["country", "city"]


async def test_one_stop_is_one_stop_and_long_timeouts_are_capped(
    client: BlockragClient, server: tuple[Server, str]
) -> None:
    """Row B10."""
    await client.ask("Where?", stop="END", timeout_s=5_000_000)
    request = server[0].requests[0]
    assert list(request.stop) == ["END"]
    assert request.timeout_ms == 7 * 24 * 3600 * 1000
    for timeout_s in (0, -1, float("nan")):
        with pytest.raises(InvalidRequestError, match="timeout_s"):
            await client.ask("Where?", timeout_s=timeout_s)


async def test_leaving_the_stream_cancels_the_call(client: BlockragClient, server: tuple[Server, str]) -> None:
    events = client.generate("endless")
    for _ in range(3):
        await anext(events)
    await events.aclose()
    async with asyncio.timeout(5):
        await server[0].stopped.wait()
    assert server[0].stopped.is_set()


async def test_the_deadline(client: BlockragClient) -> None:
    with pytest.raises(DeadlineError):
        await client.ask("slow", timeout_s=0.05)


async def test_an_answer_without_its_completion_is_an_error(client: BlockragClient) -> None:
    with pytest.raises(UnavailableError):
        await client.ask("truncated")


@pytest.mark.parametrize("error", [UnavailableError("a replica went away"), "Application 'gateway' not found."])
async def test_what_went_away_is_asked_again(
    client: BlockragClient, server: tuple[Server, str], error: Exception | str, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"0123456789" * 100_000)
    calls = (
        lambda: client.ask("Where?"),
        lambda: client.retrieve("q"),
        lambda: client.list_collections(),
        lambda: client.ingest_text("d0", "text"),
        lambda: client.ingest_file(file),
        lambda: client.delete_document("d0"),
        lambda: client.delete_source("rows.jsonl"),
    )
    for call in calls:
        server[0].requests.clear()
        server[0].lost = [error, error]
        assert await call()
        assert len(server[0].requests) == 3
    sent = [sum(len(message.content) for message in messages) for messages in server[0].uploads[-3:]]
    assert sent == [1_000_000] * 3


async def test_a_status_that_grpc_lost_is_asked_again(client: BlockragClient, server: tuple[Server, str]) -> None:
    code, details = LOST_STATUS
    for _ in range(2):
        server[0].lost.append((code, details))
    assert (await client.ingest_text("d0", "text")).document_id
    assert len(server[0].requests) == 3


async def test_a_message_that_is_too_large_is_not_asked_to_come_back(
    client: BlockragClient, server: tuple[Server, str]
) -> None:
    with pytest.raises(InvalidRequestError, match=r"request: .*message larger than max"):
        await client.retrieve("x" * (65 * 2**20))
    assert server[0].requests == []
    refused = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 8)")
    assert type(refused) is BlockragError


async def test_a_deletion_whose_answer_was_lost_is_done(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].lost = [UnavailableError("a replica went away"), NotFoundError("no document 'd0'")]
    assert await client.delete_document("d0") == DeletedDocument(0, 0)
    server[0].lost = [UnavailableError("a replica went away"), NotFoundError("no document came from it")]
    assert await client.delete_source("rows.jsonl") == DeletedSource((), 0, 0)
    server[0].lost = [NotFoundError("no document 'd0'")]
    with pytest.raises(NotFoundError):
        await client.delete_document("d0")


async def test_a_stream_is_asked_again_until_its_first_text_only(
    client: BlockragClient, server: tuple[Server, str]
) -> None:
    server[0].break_after = ["retrieved"]
    events = [event async for event in client.generate("Where?")]
    assert [type(event) for event in events] == [Retrieved, TextChunk, TextChunk, Completion]
    server[0].break_after = ["text"]
    with pytest.raises(UnavailableError):
        _ = [event async for event in client.generate("Where?")]
    server[0].break_after = ["text", "retrieved"]
    assert (await client.ask("Where?")).text == "Oslo"


async def test_other_errors_are_not_asked_again(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].lost = [OverloadedError("64 answers are in progress", 130)]
    with pytest.raises(OverloadedError):
        await client.ask("Where?")
    assert len(server[0].requests) == 1


async def test_patience_ends(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].error = UnavailableError("a replica went away")
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        await client.ask("Where?")
    assert time.monotonic() - began < 5
    assert len(server[0].requests) > 2


async def test_an_answer_to_a_question_that_was_sent_again_has_its_whole_time(
    client: BlockragClient, server: tuple[Server, str]
) -> None:
    server[0].lost = [UnavailableError("a replica went away")]
    assert (await client.ask("Where?", timeout_s=5)).text == "Oslo"
    assert 4000 < server[0].requests[1].timeout_ms < 5000  # the client's patience is one second


async def test_a_warming_that_gets_on_is_begun_again_each_time(server: tuple[Server, str]) -> None:
    server[0].warm_breaks, server[0].warm_pause_s = [4, 9, 9], 0.4
    async with BlockragClient(server[1], KEY, patience_s=0.6) as client:
        began = time.monotonic()
        assert [step.done async for step in client.warm()] == [4, 4, 4, 9]
        assert time.monotonic() - began > 0.6  # longer than the patience with one failure
        server[0].warm_breaks = [9] * 20
        with pytest.raises(UnavailableError):  # the beginning alone, again and again, is no progress
            _ = [step async for step in client.warm()]
    assert server[0].warm_breaks


async def test_retrieve(client: BlockragClient, server: tuple[Server, str]) -> None:
    condition = Condition("year", "at_least", (1990,))
    (passage,) = await client.retrieve("q", top_k=3, filter=[condition])
    assert passage.score == 0.5
    assert server[0].requests[0].filter[0].operator == common_pb2.CONDITION_OPERATOR_AT_LEAST


async def test_ingesting_a_file_streams_it_in_pieces(
    client: BlockragClient, server: tuple[Server, str], tmp_path: Path
) -> None:
    path = tmp_path / "big.txt"
    path.write_bytes(b"0123456789" * 200_000)
    (document,) = await client.ingest_file(path, collection="c", metadata={"year": 1999})
    assert document == IngestedDocument("big.txt", "v1", 3, "replaced")
    header, *pieces = server[0].requests[0]
    assert header.header.collection == "c"
    assert header.header.metadata["year"] == 1999
    assert len(pieces) == 4
    assert all(len(piece.content) <= 2**20 for piece in pieces)
    assert b"".join(piece.content for piece in pieces) == path.read_bytes()


async def test_ingesting_text_and_nothing(client: BlockragClient, server: tuple[Server, str]) -> None:
    document = await client.ingest_text("note", "Hello.", title="A note")
    assert document.document_id == "note"
    assert server[0].requests[0][0].header.media_type == "text/plain"
    await client.ingest_bytes("empty.txt", b"")
    assert len(server[0].requests[1]) == 1
    with pytest.raises(InvalidRequestError):
        await client.ingest_text("note", "Hello.", metadata={"a": object()})
    with pytest.raises(FileNotFoundError):
        await client.ingest_file("/nowhere/at/all.txt")


async def test_documents_and_collections(client: BlockragClient) -> None:
    listed = [document.document_id async for document in client.list_documents(page_size=2)]
    assert listed == ["d0", "d1", "d2", "d3", "d4"]
    assert await client.list_collections() == (Collection("default", 2, 9),)
    assert await client.delete_document("d0") == DeletedDocument(3, 2)
    assert await client.delete_collection("c") == DeletedCollection(1, 3, 2)


async def test_warm_reports_progress(client: BlockragClient) -> None:
    steps = [step async for step in client.warm(pin=True)]
    assert [(step.done, step.total) for step in steps] == [(4, 9), (9, 9)]


async def test_waiting_until_every_service_answers(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].unhealthy = 2
    description = await client.wait_until_ready(10)
    assert description.healthy
    assert description.kv_cache["tenants"] == [{"tenant": "acme", "blocks": 3, "bytes": 0}]
    assert len(server[0].requests) == 3


async def test_not_ready_in_time_says_what_is_missing(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].unhealthy = 10**6
    with pytest.raises(UnavailableError, match="decoder: still starting"):
        await client.wait_until_ready(2.0)


async def test_a_wrong_key_is_not_waited_for(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].error = UnauthenticatedError("the API key is not known")
    with pytest.raises(UnauthenticatedError):
        await client.wait_until_ready(60)


async def test_nobody_there() -> None:
    async with BlockragClient("127.0.0.1:1", patience_s=0.3) as client:
        with pytest.raises(UnavailableError):
            await client.ask("Where?")
        with pytest.raises(UnavailableError, match="not ready"):
            await client.wait_until_ready(0.3)


async def test_a_trace_is_waited_for_and_holds_the_clients_span(
    client: BlockragClient, server: tuple[Server, str]
) -> None:
    answer = await client.ask("Where?")
    server[0].traces = [[], ["root"], ["root", "late"], ["root", "late"]]
    spans = await client.trace(answer.completion.trace_id)
    assert [span.name for span in spans] == ["client RagService/Generate", "root", "late"]
    assert spans[0].span_id == span_id_of(server[0].metadata["traceparent"])
    assert spans[0].milliseconds > 0


async def test_no_trace(client: BlockragClient, server: tuple[Server, str]) -> None:
    server[0].traces = [[]]
    with pytest.raises(NotFoundError):
        await client.trace("a" * 32, wait_s=0.1)


async def test_the_callers_own_trace_is_continued(client: BlockragClient, server: tuple[Server, str]) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

    parent = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1))
    with use_span(NonRecordingSpan(parent)):
        await client.retrieve("q")
    assert trace_id_of(server[0].metadata["traceparent"]) == f"{0xABC:032x}"
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("filter[0].values", "must be one number"),
        PromptTooLongError("question (900 tokens) and answer (48) do not fit"),
        NotFoundError("no collection 'x'"),
        UnauthenticatedError("the API key is not known"),
        OverloadedError("64 answers are in progress", 130),
        DeadlineError("the request took longer than its 50 ms"),
        UnavailableError("retriever: not deployed"),
        DataError("the index is damaged"),
        SetupError("something to set up"),
    ],
)
def test_errors_come_back_as_they_were(error: BlockragError) -> None:
    back = error_of(status_code(error), str(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_other_statuses() -> None:
    assert isinstance(error_of(status_code(SettingsError("x")), "x"), SetupError)
    assert isinstance(error_of(grpc.StatusCode.NOT_FOUND, "Application 'gateway' not found."), UnavailableError)
    dropped = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "Request dropped due to backpressure")
    assert isinstance(dropped, OverloadedError)
    assert dropped.retry_after_ms > 0
    for details in ("Received RST_STREAM with error code 2", "Received http2 header with status: 502"):
        assert isinstance(error_of(grpc.StatusCode.INTERNAL, details), UnavailableError)
    assert str(error_of(grpc.StatusCode.INTERNAL, "id 1")) == "INTERNAL: id 1"


def test_importing_the_client_is_light() -> None:
    heavy = "{'ray', 'torch', 'transformers', 'pydantic', 'opentelemetry', 'numpy'}"
    code = f"import sys, blockrag.client; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
