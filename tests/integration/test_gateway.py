"""The gateway in the running system, over gRPC: answers, documents, bad input, health, reflection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from blockrag.client import BlockragClient
from blockrag.errors import (
    BlockragError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
)
from blockrag.results import Completion, Compression, Condition, GenerateOptions, GivenPassage, Retrieved
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc
from tests.integration.conftest import Cluster

GATEWAY = (("application", "gateway"),)
ARTICLES = {
    "norway.txt": "Norway is a country in northern Europe. The capital of Norway is Oslo.",
    "peru.txt": "Peru is a country in South America. The capital of Peru is Lima.",
    "kenya.txt": "Kenya is a country in eastern Africa. The capital of Kenya is Nairobi.",
}
_NAMES = (f"gateway-{number}" for number in itertools.count())


def articles(collection: str) -> dict[str, str]:
    """Texts that no other collection has: blocks of equal texts are shared, in the decoder's memory too."""
    return {document_id: f"{text} Filed under {collection}." for document_id, text in ARTICLES.items()}


@pytest.fixture
async def collection(client: BlockragClient) -> AsyncIterator[str]:
    """A collection with three small articles, removed at the end."""
    name = next(_NAMES)
    for document_id, text in articles(name).items():
        await client.ingest_text(document_id, text, collection=name, metadata={"letters": len(text)})
    yield name
    await client.delete_collection(name)


@pytest.fixture
async def channel(cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.target) as opened:
        yield opened


@pytest.mark.parametrize("mode", ["block", "full", "none"])
async def test_an_answer_in_each_mode(client: BlockragClient, collection: str, mode: Any) -> None:
    answer = await client.ask(
        "What is the capital of Norway?", collection=collection, top_k=2, attention_mode=mode, max_tokens=8
    )
    done = answer.completion
    assert done.attention_mode == mode
    assert answer.text
    assert done.usage.completion_tokens == 8
    assert list(done.stages_ms) == ["retrieve", "plan", "queue", "kv_fetch", "compose", "prefill", "decode", "total"]
    assert 0 < done.time_to_first_token_ms <= done.stages_ms["total"]
    if mode == "none":
        assert answer.passages == ()
        assert done.citations == ()
    else:
        assert answer.passages[0].document_id == "norway.txt"
        assert [citation.in_prompt for citation in done.citations] == [True, True]
        assert done.usage.prompt_tokens > sum(citation.tokens for citation in done.citations)


async def test_the_second_question_finds_its_blocks_cached(client: BlockragClient, collection: str) -> None:
    first = await client.ask("What is the capital of Peru?", collection=collection, top_k=3, max_tokens=4)
    again = await client.ask("Where is Peru?", collection=collection, top_k=3, max_tokens=4)
    assert {passage.passage_id for passage in again.passages} == {passage.passage_id for passage in first.passages}
    tokens = sum(citation.tokens for citation in again.completion.citations)
    assert again.completion.usage.cached_tokens >= tokens
    assert again.completion.usage.encoded_tokens == 0


async def test_given_passages_are_used_instead_of_retrieval(client: BlockragClient) -> None:
    given = [GivenPassage("The capital of Utopia is Amaurot.", title="Utopia")]
    answer = await client.ask("What is the capital of Utopia?", passages=given, max_tokens=4)
    assert [citation.passage_id for citation in answer.completion.citations] == ["given-0"]
    assert answer.completion.stages_ms["retrieve"] == 0.0


async def test_the_same_seed_gives_the_same_text(client: BlockragClient, collection: str) -> None:
    async def sample(seed: int) -> str:
        answer = await client.ask("Where?", collection=collection, temperature=1.0, seed=seed, max_tokens=12)
        assert answer.completion.seed == seed
        return answer.text

    assert await sample(3) == await sample(3)


async def test_passages_that_do_not_fit_are_reported(client: BlockragClient, collection: str) -> None:
    answer = await client.ask("Where?", collection=collection, top_k=3, max_context_tokens=40, max_tokens=2)
    kept = [citation for citation in answer.completion.citations if citation.in_prompt]
    dropped = [citation for citation in answer.completion.citations if not citation.in_prompt]
    assert sum(citation.tokens for citation in kept) <= 40
    assert dropped
    assert all(citation.dropped_reason for citation in dropped)


async def test_search_with_a_filter(client: BlockragClient, collection: str) -> None:
    longest = max(len(text) for text in articles(collection).values())
    found = await client.retrieve(
        "capital", collection=collection, filter=[Condition("letters", "at_least", (longest,))]
    )
    assert found
    assert all(passage.metadata["letters"] >= longest for passage in found)


async def test_documents_are_listed_updated_and_deleted(client: BlockragClient, collection: str) -> None:
    assert [found.document_id async for found in client.list_documents(collection=collection, page_size=2)] == sorted(
        ARTICLES
    )
    text = articles(collection)["peru.txt"]
    again = await client.ingest_text("peru.txt", text, collection=collection, metadata={"letters": len(text)})
    assert again.outcome == "unchanged"
    updated = await client.ingest_text("peru.txt", "Peru has a new capital: Cusco.", collection=collection)
    assert updated.outcome == "replaced"
    found = await client.retrieve("capital of Peru", collection=collection, top_k=5)
    assert not any("Lima" in passage.text for passage in found)
    removed = await client.delete_document("kenya.txt", collection=collection)
    assert removed.passages == 1
    with pytest.raises(NotFoundError):
        await client.delete_document("kenya.txt", collection=collection)
    (own,) = [found for found in await client.list_collections() if found.name == collection]
    assert own.documents == 2


async def test_warming_makes_the_first_question_a_hit(client: BlockragClient, collection: str) -> None:
    steps = [step async for step in client.warm(collection=collection)]
    assert steps[-1].done == steps[-1].total == 3
    answer = await client.ask("Where is Kenya?", collection=collection, max_tokens=2)
    assert answer.completion.usage.encoded_tokens == 0
    assert answer.completion.usage.store_tokens > 0


async def test_one_trace_runs_through_every_service(client: BlockragClient, collection: str) -> None:
    for compression, services in (
        (None, {"client", "gateway", "retriever", "decoder"}),
        (Compression(rate=2), {"client", "gateway", "retriever", "compressor", "decoder"}),
    ):
        options: GenerateOptions = {} if compression is None else {"compression": compression}
        answer = await client.ask("Where is Norway?", collection=collection, max_tokens=2, **options)
        spans = await client.trace(answer.completion.trace_id)
        ids = {span.span_id for span in spans}
        roots = [span for span in spans if span.parent_span_id not in ids]
        assert [root.service for root in roots] == ["client"]
        assert services <= {span.service for span in spans}
        assert ("compressor" in services) == ("plan" in {span.name for span in spans})
        assert all(span.start_unix_ns <= span.end_unix_ns for span in spans)
        assert not [span.name for span in spans if span.error]


async def test_the_system_describes_itself(client: BlockragClient) -> None:
    description = await client.wait_until_ready(30)
    assert [service.name for service in description.services] == [
        "gateway",
        "retriever",
        "encoder",
        "kv_cache",
        "compressor",
        "decoder",
        "http",
    ]
    assert description.bundle_fingerprint == description.decoder["bundle_fingerprint"]
    assert description.max_top_k == 50


Call = Callable[[BlockragClient, str], Coroutine[Any, Any, Any]]
BAD: dict[str, tuple[Call, type[BlockragError], str]] = {
    "empty question": (lambda client, name: client.ask("", collection=name), InvalidRequestError, "question"),
    "1 MB question": (lambda client, name: client.ask("x" * 2**20, collection=name), InvalidRequestError, "question"),
    "control characters": (lambda client, name: client.ask("a\x00b", collection=name), InvalidRequestError, "U\\+0000"),
    "unknown collection": (lambda client, name: client.ask("q", collection="nobody"), NotFoundError, "nobody"),
    "top_k 0": (lambda client, name: client.ask("q", collection=name, top_k=0), InvalidRequestError, "top_k"),
    "top_k 10,000": (lambda client, name: client.ask("q", collection=name, top_k=10_000), InvalidRequestError, "top_k"),
    "max_tokens beyond the model": (
        lambda client, name: client.ask("q", collection=name, max_tokens=99_999),
        PromptTooLongError,
        "max_tokens",
    ),
    "malformed filter": (
        lambda client, name: client.ask("q", collection=name, filter=[Condition("year", "at_least", ("x",))]),
        InvalidRequestError,
        r"filter\[0\].values",
    ),
    "empty file": (
        lambda client, name: client.ingest_bytes("a.txt", b"", collection=name),
        InvalidRequestError,
        "empty",
    ),
    "binary": (
        lambda client, name: client.ingest_bytes("a.txt", bytes(range(256)) * 40, collection=name),
        InvalidRequestError,
        "content",
    ),
    "unknown suffix": (
        lambda client, name: client.ingest_bytes("a.xyz", b"text", collection=name),
        InvalidRequestError,
        "media_type",
    ),
    "not a pdf": (
        lambda client, name: client.ingest_bytes("a.pdf", b"%PDF-1.7 broken", collection=name),
        InvalidRequestError,
        "content",
    ),
    "document too large": (
        lambda client, name: client.ingest_bytes("a.txt", b"word " * (13 * 2**20 + 1), collection=name),
        InvalidRequestError,
        "64 MiB",
    ),
    "collection's name": (
        lambda client, name: client.ingest_text("a", "text", collection="../up"),
        InvalidRequestError,
        "collection",
    ),
    "unknown document to warm": (
        lambda client, name: _all(client.warm(collection=name, document_ids=["nobody"])),
        NotFoundError,
        "nobody",
    ),
    "unknown trace": (lambda client, name: client.trace("f" * 32, wait_s=0.1), NotFoundError, "f" * 32),
    "no trace id": (lambda client, name: client.trace("xyz"), InvalidRequestError, "trace_id"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_refused_by_name_and_stores_nothing(
    client: BlockragClient, collection: str, case: str
) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        await call(client, collection)
    assert [found.document_id async for found in client.list_documents(collection=collection)] == sorted(ARTICLES)


async def test_bytes_that_are_no_utf_8(channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream("/blockrag.v1.RagService/Generate")(b"\x0a\x03\xff\xfe\xfd", metadata=GATEWAY)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        _ = [message async for message in call]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (refused.value.details() or "")


@pytest.mark.slow
async def test_a_large_document_streams_through(client: BlockragClient, collection: str) -> None:
    content = b"<html><title>Large</title><!--" + b"filler " * (50 * 2**20 // 7) + b"--><p>The end.</p></html>"
    (document,) = await client.ingest_bytes("large.html", content, collection=collection)
    assert document.passages == 1


async def test_an_interrupted_upload_stores_nothing_and_can_be_sent_again(
    client: BlockragClient, channel: grpc.aio.Channel, collection: str
) -> None:
    header = corpus_pb2.DocumentHeader(collection=collection, document_id="half.txt")
    taken = asyncio.Event()

    async def half() -> AsyncIterator[corpus_pb2.IngestDocumentRequest]:
        yield corpus_pb2.IngestDocumentRequest(header=header)
        yield corpus_pb2.IngestDocumentRequest(content=b"The first half of a sentence.")
        taken.set()
        await asyncio.Event().wait()

    call = corpus_pb2_grpc.CorpusServiceStub(channel).IngestDocument(half(), metadata=GATEWAY)  # type: ignore[no-untyped-call]
    await taken.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert "half.txt" not in {found.document_id async for found in client.list_documents(collection=collection)}
    whole = await client.ingest_text("half.txt", "The whole sentence.", collection=collection)
    assert whole.outcome == "created"


async def test_a_passed_deadline_is_told(client: BlockragClient, collection: str) -> None:
    with pytest.raises(DeadlineError):
        await client.ask("Where is Norway?", collection=collection, timeout_s=0.002)


async def test_clients_that_leave_free_their_slots(client: BlockragClient, collection: str) -> None:
    async def leave(number: int) -> None:
        events = client.generate(f"Question {number}?", collection=collection, temperature=1.0, max_tokens=400)
        async for event in events:
            if not isinstance(event, Retrieved):
                break
        await events.aclose()

    await asyncio.gather(*(leave(number) for number in range(8)))
    async with asyncio.timeout(10):
        while True:
            decoder = (await client.describe()).decoder
            if decoder["running"] == decoder["waiting"] == decoder["used_slots"] == 0:
                break
    assert decoder["used_slots"] == 0


async def test_too_much_load_is_refused_with_a_hint_and_passes(client: BlockragClient, collection: str) -> None:
    outcomes = await asyncio.gather(
        *(client.ask("Where is Peru?", collection=collection, max_tokens=16) for _ in range(120)),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(refused) + len(answered) == 120
    assert refused  # two replicas of 32 places
    assert all(error.retry_after_ms > 0 for error in refused)
    assert len(answered) >= 32
    assert isinstance((await client.ask("Where?", collection=collection, max_tokens=2)).completion, Completion)


# Standard clients of health and reflection send no metadata.
@pytest.mark.parametrize("metadata", [(), GATEWAY], ids=["plain", "gateway"])
@pytest.mark.parametrize("service", ["", "blockrag.v1.RagService", "blockrag.v1.DecoderService"])
async def test_health(channel: grpc.aio.Channel, service: str, metadata: tuple[tuple[str, str], ...]) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, metadata=metadata, timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("metadata", [(), GATEWAY], ids=["plain", "gateway"])
async def test_reflection_lists_every_service(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    (response,) = [answer async for answer in stub.ServerReflectionInfo(iter(requests), metadata=metadata, timeout=10)]
    names = {service.name for service in response.list_services_response.service}
    assert {
        "blockrag.v1.RagService",
        "blockrag.v1.CorpusService",
        "blockrag.v1.SystemService",
        "blockrag.v1.RetrieverService",
        "blockrag.v1.EncoderService",
        "blockrag.v1.KvCacheService",
        "blockrag.v1.CompressorService",
        "blockrag.v1.DecoderService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    } <= names


async def _all(progress: AsyncIterator[Any]) -> list[Any]:
    return [step async for step in progress]
