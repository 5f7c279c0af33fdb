"""The decoder in the running system, called alone over gRPC and through its handle."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from ray import serve

from blockrag.configured import configured_bundle
from blockrag.modeling.bundle import Bundle
from blockrag.settings import Settings
from blockrag.telemetry import new_traceparent, read_trace, trace_directory, trace_id_of
from blockrag.telemetry.tracing import StoredSpan
from blockrag.v1 import common_pb2, decoder_pb2, decoder_pb2_grpc, kv_cache_pb2, kv_cache_pb2_grpc
from tests.integration.conftest import Cluster

_DECODER = (("application", "decoder"),)
_KV_CACHE = (("application", "kv_cache"),)


@pytest.fixture(scope="module")
def bundle(cluster: Cluster) -> Bundle:
    return configured_bundle(cluster.settings)


@pytest.fixture
async def channel(cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.target) as opened:
        yield opened


class Asking:
    """Makes requests with passages that no other test has, so what is cached is known."""

    def __init__(self, bundle: Bundle, channel: grpc.aio.Channel) -> None:
        self._bundle = bundle
        self._tokenizer = bundle.load_tokenizer()
        self.stub = decoder_pb2_grpc.DecoderServiceStub(channel)
        self.mark = uuid.uuid4().hex

    def request(self, passages: int = 2, **fields: object) -> decoder_pb2.DecodeRequest:
        template, tokenizer = self._bundle.template, self._tokenizer
        blocks = [common_pb2.PromptBlock(token_ids=template.instruction_ids(tokenizer))]
        for number in range(passages):
            ids = template.passage_ids(tokenizer, f"Town {number}", f"The town {self.mark} has {number} mills.")
            blocks.append(
                common_pb2.PromptBlock(token_ids=ids, document_id=f"{self.mark}-{number}", collection="decoder-tests")
            )
        request = decoder_pb2.DecodeRequest(
            context=common_pb2.RequestContext(request_id=self.mark, tenant="public", traceparent=new_traceparent()),
            blocks=blocks,
            final_token_ids=template.final_ids(tokenizer, "How many mills does the town have?"),
            sampling=common_pb2.Sampling(max_tokens=12),
        )
        request.MergeFrom(decoder_pb2.DecodeRequest(**fields))  # type: ignore[arg-type]
        return request

    async def ask(self, request: decoder_pb2.DecodeRequest) -> tuple[str, decoder_pb2.DecodeFinish]:
        messages = [message async for message in self.stub.Decode(request, metadata=_DECODER, timeout=60)]
        assert messages[-1].HasField("finish")
        return "".join(message.text for message in messages), messages[-1].finish

    async def status(self) -> decoder_pb2.GetDecoderStatusResponse:
        return await self.stub.GetDecoderStatus(decoder_pb2.GetDecoderStatusRequest(), metadata=_DECODER, timeout=10)


@pytest.fixture
def asking(bundle: Bundle, channel: grpc.aio.Channel) -> Asking:
    return Asking(bundle, channel)


def _block_tokens(request: decoder_pb2.DecodeRequest) -> int:
    return sum(len(block.token_ids) for block in request.blocks)


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.02)


async def test_a_prompt_is_encoded_once_and_then_in_memory(asking: Asking) -> None:
    request = asking.request()
    cold_text, cold = await asking.ask(request)
    warm_text, warm = await asking.ask(request)
    assert cold_text == warm_text != ""
    blocks = _block_tokens(request)
    passages = blocks - len(request.blocks[0].token_ids)
    assert cold.usage.encoded_tokens >= passages
    assert (warm.usage.l1_tokens, warm.usage.cached_tokens, warm.usage.encoded_tokens) == (blocks, blocks, 0)
    assert warm.usage.prompt_tokens == blocks + len(request.final_token_ids)
    assert [stage.stage for stage in warm.stages] == ["queue", "kv_fetch", "compose", "prefill", "decode"]


async def test_full_and_none_modes_prefill_the_whole_prompt(asking: Asking) -> None:
    request = asking.request(attention_mode=common_pb2.ATTENTION_MODE_FULL)
    _, finish = await asking.ask(request)
    assert finish.usage.prefill_tokens == _block_tokens(request) + len(request.final_token_ids)
    _, finish = await asking.ask(asking.request(0, attention_mode=common_pb2.ATTENTION_MODE_NONE))
    assert finish.usage.cached_tokens == 0


async def test_many_clients_get_what_each_gets_alone(asking: Asking) -> None:
    requests = [asking.request(1 + number % 3) for number in range(12)]
    alone = [(await asking.ask(request))[0] for request in requests[:3]]
    together = await asyncio.gather(*map(asking.ask, requests))
    assert [text for text, _ in together] == alone * 4


async def test_a_purged_document_leaves_the_decoders_memory(asking: Asking, channel: grpc.aio.Channel) -> None:
    request = asking.request()
    await asking.ask(request)
    purge = kv_cache_pb2.PurgeDocumentsRequest(
        context=common_pb2.RequestContext(tenant="public"),
        documents=[kv_cache_pb2.DocumentRef(collection="decoder-tests", document_id=f"{asking.mark}-0")],
    )
    stub = kv_cache_pb2_grpc.KvCacheServiceStub(channel)
    assert (await stub.PurgeDocuments(purge, metadata=_KV_CACHE, timeout=10)).blocks == 1

    async def forgotten() -> bool:
        _, finish = await asking.ask(request)
        return finish.usage.encoded_tokens == len(request.blocks[1].token_ids)

    await _until(forgotten, 10)


async def test_a_client_that_leaves_frees_its_slots(asking: Asking) -> None:
    endless = asking.request(sampling=common_pb2.Sampling(max_tokens=8000, temperature=1.0))
    call = asking.stub.Decode(endless, metadata=_DECODER, timeout=60)
    await call.read()
    assert (await asking.status()).used_slots > 8000
    call.cancel()

    async def free() -> bool:
        return (await asking.status()).used_slots == 0

    await _until(free, 2)


async def test_a_deadline_ends_the_answer(asking: Asking) -> None:
    request = asking.request(sampling=common_pb2.Sampling(max_tokens=8000, temperature=1.0))
    await asking.ask(asking.request())  # the blocks are there, so the time goes into decoding
    request.time_left_ms = 300
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asking.ask(request)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await asking.status()).used_slots == 0


async def test_a_bad_request_is_an_invalid_argument_that_names_the_field(asking: Asking) -> None:
    request = asking.request()
    request.final_token_ids.append(4_000_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asking.ask(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "final_token_ids" in str(caught.value.details())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asking.ask(asking.request(sampling=common_pb2.Sampling(max_tokens=10**6)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_tokens" in str(caught.value.details())


async def test_stages_are_spans_of_the_request(asking: Asking, cluster: Cluster) -> None:
    request = asking.request()
    await asking.ask(request)
    trace_id = trace_id_of(request.context.traceparent)

    async def written() -> bool:
        names = {span.name for span in _spans(cluster.settings, trace_id)}
        return {"kv_fetch", "prefill", "decode"} <= names

    await _until(written, 10)
    fetch = next(span for span in _spans(cluster.settings, trace_id) if span.name == "kv_fetch")
    assert int(fetch.attributes["blockrag.encoded_tokens"]) > 0


def _spans(settings: Settings, trace_id: str) -> list[StoredSpan]:
    return read_trace(trace_directory(settings), trace_id)


async def test_the_handle_streams_and_stops_when_the_reader_does(asking: Asking, cluster: Cluster) -> None:
    handle = await asyncio.to_thread(serve.get_app_handle, "decoder")
    endless = asking.request(sampling=common_pb2.Sampling(max_tokens=8000, temperature=1.0))
    responses = handle.options(stream=True).Decode.remote(endless)
    async for message in responses:
        assert message.tokens > 0
        break
    responses.cancel()

    async def free() -> bool:
        return (await asking.status()).used_slots == 0

    await _until(free, 2)


async def test_status_describes_the_replica(asking: Asking, bundle: Bundle) -> None:
    await asking.ask(asking.request())
    status = await asking.status()
    assert status.bundle_fingerprint == bundle.fingerprint
    assert status.l1_blocks > 0
    assert status.total_slots > 0
    assert status.generated_tokens > 0
