"""The whole decoder but for Ray: protobuf in, protobuf out, with a real tiny bundle and blocks encoded in process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from blockrag.decoder.block_loading import EncodingBlockSource
from blockrag.decoder.engine import Engine
from blockrag.decoder.l1 import L1Cache
from blockrag.decoder.service import DecodeService, assemble, warm_up
from blockrag.errors import DeadlineError, InvalidRequestError, OverloadedError, PromptTooLongError
from blockrag.kv_cache.shard_messages import BlockSource
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel
from blockrag.settings import DecoderSettings, Settings
from blockrag.v1 import common_pb2, decoder_pb2
from tests.models import make_tiny_bundle, make_tiny_model
from tests.unit.decoder.fakes import FakeSource, until


@dataclass
class Decoder:
    service: DecodeService
    engine: Engine
    l1: L1Cache

    async def ask(self, request: decoder_pb2.DecodeRequest) -> tuple[str, decoder_pb2.DecodeFinish]:
        messages = [message async for message in self.service.decode(request)]
        assert all(not message.HasField("finish") for message in messages[:-1])
        assert sum(message.tokens for message in messages) == messages[-1].finish.usage.completion_tokens
        return "".join(message.text for message in messages), messages[-1].finish


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> SlotModel:
    return SlotModel.load(bundle)


def _decoder(bundle: Bundle, model: SlotModel, source: BlockSource, **limits: int) -> Decoder:
    service = assemble(bundle, model, source, Settings(decoder=DecoderSettings(l1_mb=1, threads=1, **limits)))
    service.engine.start()
    return Decoder(service, service.engine, service.l1)


@pytest.fixture
def decoder(bundle: Bundle, model: SlotModel) -> Iterator[Decoder]:
    made = _decoder(bundle, model, EncodingBlockSource(model))
    yield made
    made.engine.stop()


@pytest.fixture
def endless(bundle: Bundle) -> Iterator[Decoder]:
    """A decoder whose model never ends an answer."""
    model = SlotModel.from_pretrained_model(make_tiny_model(), end_token_ids=[])
    made = _decoder(bundle, model, EncodingBlockSource(model))
    yield made
    made.engine.stop()


@pytest.fixture
async def held(bundle: Bundle, model: SlotModel) -> AsyncIterator[tuple[Decoder, FakeSource]]:
    """A decoder whose blocks do not come."""
    source = FakeSource()
    source.gate.clear()
    made = _decoder(bundle, model, source, max_sequences=1, max_waiting=1)
    yield made, source
    made.engine.stop()


def _request(
    mode: common_pb2.AttentionMode = common_pb2.ATTENTION_MODE_BLOCK,
    *,
    max_tokens: int = 12,
    time_left_ms: int = 0,
    blocks: tuple[tuple[int, ...], ...] = ((1,), (3, 40, 41, 4, 50, 51), (3, 60, 4, 70)),
    **sampling: object,
) -> decoder_pb2.DecodeRequest:
    return decoder_pb2.DecodeRequest(
        context=common_pb2.RequestContext(request_id="r", tenant="public"),
        blocks=[common_pb2.PromptBlock(token_ids=ids) for ids in blocks],
        final_token_ids=[5, 45, 67, 6],
        attention_mode=mode,
        sampling=common_pb2.Sampling(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        time_left_ms=time_left_ms,
    )


async def test_usage_says_where_the_prompt_came_from(decoder: Decoder) -> None:
    first_text, first = await decoder.ask(_request())
    second_text, second = await decoder.ask(_request())
    assert first_text == second_text
    assert first.usage.prompt_tokens == second.usage.prompt_tokens == 15
    assert (first.usage.encoded_tokens, first.usage.cached_tokens, first.usage.prefill_tokens) == (11, 0, 4)
    assert (second.usage.encoded_tokens, second.usage.cached_tokens, second.usage.l1_tokens) == (0, 11, 11)
    assert sum(block.encoded for block in first.blocks) == sum(block.l1 for block in second.blocks) == 11
    assert [block.encoded for block in first.blocks] == [block.l1 for block in second.blocks]
    assert [stage.stage for stage in second.stages] == ["queue", "kv_fetch", "compose", "prefill", "decode"]
    assert all(stage.milliseconds >= 0 for stage in second.stages)


async def test_full_mode_prefills_everything_and_caches_nothing(decoder: Decoder) -> None:
    _, finish = await decoder.ask(_request(common_pb2.ATTENTION_MODE_FULL))
    assert (finish.usage.prompt_tokens, finish.usage.prefill_tokens, finish.usage.cached_tokens) == (15, 15, 0)
    assert decoder.l1.stats().blocks == 0


async def test_one_block_gives_the_same_in_both_modes(decoder: Decoder) -> None:
    """With a single block there is nothing that block attention leaves out."""
    whole = ((1, 3, 40, 41, 4, 50, 51),)
    block_text, _ = await decoder.ask(_request(blocks=whole))
    full_text, _ = await decoder.ask(_request(common_pb2.ATTENTION_MODE_FULL, blocks=whole))
    none_text, _ = await decoder.ask(_request(common_pb2.ATTENTION_MODE_NONE, blocks=whole))
    assert block_text == full_text == none_text


async def test_an_absent_mode_is_block(decoder: Decoder) -> None:
    _, finish = await decoder.ask(_request(common_pb2.ATTENTION_MODE_UNSPECIFIED))
    assert finish.usage.prefill_tokens == 4


async def test_tenants_do_not_share_blocks(decoder: Decoder) -> None:
    await decoder.ask(_request())
    request = _request()
    request.context.tenant = "somebody"
    _, finish = await decoder.ask(request)
    assert (finish.usage.l1_tokens, finish.usage.encoded_tokens) == (0, 11)


async def test_many_at_once_get_what_each_gets_alone(decoder: Decoder) -> None:
    requests = [_request(temperature=1.0, seed=seed) for seed in range(12)]
    alone = [(await decoder.ask(request))[0] for request in requests]
    together = await asyncio.gather(*(decoder.ask(request) for request in requests))
    assert [text for text, _ in together] == alone
    await until(lambda: decoder.l1.stats().pinned_blocks == 0)
    assert decoder.engine.stats().used_slots == 0


async def test_a_closed_stream_frees_its_slots_at_once(endless: Decoder) -> None:
    stream = endless.service.decode(_request(max_tokens=2000))
    await anext(stream)
    before = time.monotonic()
    await stream.aclose()
    await until(lambda: endless.engine.stats().used_slots == 0)
    assert time.monotonic() - before < 1  # a tenth on a quiet machine
    assert endless.l1.stats().pinned_blocks == 0


async def test_a_cancelled_reader_stops_the_work(endless: Decoder) -> None:
    asking = asyncio.ensure_future(endless.ask(_request(max_tokens=2000)))
    await until(lambda: endless.engine.stats().generated_tokens > 0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: endless.engine.stats().used_slots == 0)


async def test_a_deadline_ends_the_answer(endless: Decoder) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        await endless.ask(_request(max_tokens=2000, time_left_ms=60))
    assert 0.06 <= time.monotonic() - started < 0.16
    assert endless.engine.stats().used_slots == 0


async def test_a_deadline_ends_waiting_for_blocks(held: tuple[Decoder, FakeSource]) -> None:
    decoder, source = held
    with pytest.raises(DeadlineError, match="blocks"):
        await decoder.ask(_request(time_left_ms=20))
    await until(lambda: source.cancelled == 1)


async def test_waiting_for_blocks_is_bounded(held: tuple[Decoder, FakeSource]) -> None:
    decoder, source = held
    asking = [asyncio.ensure_future(decoder.ask(_request())) for _ in range(2)]
    await until(lambda: len(source.calls) == 1)
    with pytest.raises(OverloadedError):
        await decoder.ask(_request())
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("final_token_ids", {"final_token_ids": [999]}),
        ("blocks[1].token_ids", {"blocks": [{"token_ids": [1]}, {"token_ids": []}]}),
        ("attention_mode", {"attention_mode": 17}),
        ("sampling.max_tokens", {"sampling": {"max_tokens": 0}}),
        ("sampling.max_tokens", {"sampling": {"max_tokens": 2040}}),
        ("sampling.temperature", {"sampling": {"max_tokens": 1, "temperature": -1.0}}),
    ],
)
async def test_a_bad_request_names_its_field(decoder: Decoder, field: str, change: dict[str, object]) -> None:
    request = _request()
    for name in change:
        request.ClearField(name)  # type: ignore[arg-type]
    request.MergeFrom(decoder_pb2.DecodeRequest(**change))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as caught:
        await decoder.ask(request)
    assert caught.value.field == field
    assert decoder.l1.stats().blocks == 0


async def test_an_empty_final_block_is_refused(decoder: Decoder) -> None:
    request = _request()
    request.ClearField("final_token_ids")
    with pytest.raises(InvalidRequestError, match="final_token_ids"):
        await decoder.ask(request)


async def test_a_prompt_beyond_the_model_is_refused(decoder: Decoder) -> None:
    with pytest.raises(PromptTooLongError):
        await decoder.ask(_request(blocks=((3,) * 2048,)))


async def test_status_describes_the_replica(decoder: Decoder, bundle: Bundle) -> None:
    await decoder.ask(_request())
    await decoder.ask(_request())
    status = decoder.service.status()
    assert status.bundle_fingerprint == bundle.fingerprint
    assert (status.bundle_name, status.max_positions, status.device) == ("tiny", 2048, "cpu")
    assert (status.l1_blocks, status.l1_hits, status.l1_misses) == (3, 3, 3)
    assert status.l1_bytes > 0
    assert (status.running, status.waiting, status.used_slots) == (0, 0, 0)
    assert status.generated_tokens > 0
    decoder.service.record_gauges()


def test_warming_up_fits_models_of_any_size() -> None:
    for positions in (2, 5, 64, 300):
        model = SlotModel.from_pretrained_model(make_tiny_model(max_position_embeddings=positions))
        warm_up(model)
        [block] = model.encode([[1]], ["after"])
        assert block.num_slots == 1
