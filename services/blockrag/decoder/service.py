"""The decoder's service without its shell: a planned prompt in, a stream of text out. No Ray in here.

``assemble`` puts all parts of a decoder together: in a Serve replica, in tests, in a program without a cluster.

>>> decoder = assemble(bundle, model, EncodingBlockSource(model), Settings())
>>> decoder.engine.start()
>>> async for message in decoder.decode(request): ...
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

from blockrag.alike import alike
from blockrag.configured import configured_keys
from blockrag.decoder.block_loading import TIERS, BlockLoader, BlockTier, LoadedBlocks
from blockrag.decoder.costs import MOST_PREFILL_TOKENS, CostMeters
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.decoder.engine import Engine
from blockrag.decoder.l1 import L1Cache
from blockrag.decoder.prompt import ComposedPrompt, Prompt, compose, read_blocks, read_prompt
from blockrag.decoder.scheduler import EngineLimits
from blockrag.decoder.sequence import Event, Finish, GenerationRequest, TokenStream
from blockrag.errors import DeadlineError, OverloadedError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import BlockSource
from blockrag.limits import MIB, RETRY_AFTER_MS
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.settings import Settings
from blockrag.telemetry import metrics, span
from blockrag.v1 import common_pb2, decoder_pb2
from blockrag.v1.decoder_pb2 import GetDecoderStatusResponse

_NOTHING_LOADED = LoadedBlocks()


@dataclass
class DecodeService:
    """Loads a prompt's blocks, hands it to the engine and passes the text on."""

    engine: Engine
    loader: BlockLoader
    l1: L1Cache
    keys: KeyMaker
    meters: CostMeters
    model: decoder_pb2.GetDecoderStatusResponse
    """What the status says of the model."""
    vocab_size: int
    chunk_tokens: int
    """Tokens of a chunk; 0: the bundle cannot compress."""
    max_loading: int
    _loading: int = 0

    async def decode(self, request: decoder_pb2.DecodeRequest) -> AsyncGenerator[decoder_pb2.DecodeResponse, None]:
        """The answer, piece by piece; the last message has the finish.

        Closing the generator stops the work. Raises ``InvalidRequestError``, ``PromptTooLongError``,
        ``OverloadedError``, ``DeadlineError``, ``UnavailableError`` and what fetching blocks raises.
        """
        deadline = time.monotonic() + request.time_left_ms / 1000 if request.time_left_ms else None
        prompt = read_prompt(request, self.keys, self.vocab_size, self.chunk_tokens)
        self.engine.check(prompt.slots, prompt.sampling.max_tokens, request.context.tenant)
        started = time.monotonic()
        loaded = await self._load(request, prompt, deadline)
        fetch_seconds = time.monotonic() - started
        tokens = Counter[BlockTier]()
        for wanted, tier in zip(prompt.requests, loaded.tiers, strict=False):
            tokens[tier] += wanted.token_ids.size
        self.meters.record_fetch(tokens, 1000 * fetch_seconds)
        stream = TokenStream()
        try:
            composed = compose(prompt.parts, loaded, self.chunk_tokens)
            metrics.KV_CACHE_QUERY_TOKENS.inc(prompt.composed_slots, tier="l1")
            metrics.KV_CACHE_HIT_TOKENS.inc(composed.slots("l1"), tier="l1")
            generation = GenerationRequest(
                request_id=request.context.request_id,
                blocks=composed.blocks,
                token_ids=prompt.token_ids,
                sampling=prompt.sampling,
                tenant=request.context.tenant,
                deadline=deadline,
                released=partial(self.loader.release, loaded),
            )
            sequence = self.engine.submit(generation, stream.push)
        except BaseException:
            self.loader.release(loaded)
            raise
        try:
            with span("prefill", request.context, attention_mode=prompt.mode, prefill_tokens=len(prompt.token_ids)):
                event = await stream.read()
            last = time.monotonic()
            with span("decode", request.context, attention_mode=prompt.mode) as decoding:
                while event.finish is None:
                    yield decoder_pb2.DecodeResponse(text=event.text, tokens=event.tokens)
                    event = await stream.read()
                    last = _observe_pace(event, last, prompt.mode)
                response = _finished(event, event.finish, prompt, composed, fetch_seconds)
                self._measure(prompt, event.finish)
                decoding.set(completion_tokens=event.finish.completion_tokens, finish_reason=event.finish.reason)
            yield response
            metrics.GENERATED_TOKENS.inc(response.finish.usage.completion_tokens, attention_mode=prompt.mode)
        finally:
            self.engine.cancel(sequence)

    async def estimate(self, request: decoder_pb2.EstimatePrefillRequest) -> decoder_pb2.EstimatePrefillResponse:
        """What a first token would take behind these blocks. Raises ``InvalidRequestError``."""
        wanted = read_blocks(request, self.keys, self.vocab_size, self.chunk_tokens)
        tiers = await self.loader.locate([block.key for block in wanted])
        fit = self.meters.prefill.line()
        return decoder_pb2.EstimatePrefillResponse(
            base_ms=fit.base,
            slot_ms=fit.slope,
            measured_prefills=fit.samples,
            tiers=tiers,
            fetches=[
                decoder_pb2.FetchCost(tier=tier, base_ms=fetch.base, token_ms=fetch.slope)
                for tier, meter in self.meters.fetches.items()
                for fetch in (meter.line(),)
            ],
        )

    def status(self) -> decoder_pb2.GetDecoderStatusResponse:
        """What this replica holds and does."""
        engine, l1, fit = self.engine.stats(), self.l1.stats(), self.meters.prefill.line()
        return alike(
            decoder_pb2.GetDecoderStatusResponse,
            self.model,
            **vars(engine),
            prefill_base_ms=fit.base,
            prefill_slot_ms=fit.slope,
            measured_prefills=fit.samples,
            **{f"l1_{name}": getattr(l1, name) for name in ("blocks", "bytes", "budget_bytes", "hits", "misses")},
        )

    def record_gauges(self) -> None:
        """Bring the gauges up to date; called once a second."""
        engine, l1 = self.engine.stats(), self.l1.stats()
        metrics.NUM_REQUESTS_RUNNING.set(engine.running, service="decoder")
        metrics.NUM_REQUESTS_WAITING.set(engine.waiting + self._loading, service="decoder")
        metrics.KV_CACHE_USAGE_PERC.set(l1.bytes / l1.budget_bytes, tier="l1")
        metrics.KV_CACHE_USAGE_PERC.set(engine.used_slots / engine.total_slots, tier="slots")

    def _measure(self, prompt: Prompt, finish: Finish) -> None:
        if prompt.parts and len(prompt.token_ids) <= MOST_PREFILL_TOKENS:
            seconds = finish.stages.compose + finish.stages.prefill
            self.meters.prefill.record(1000 * seconds, prompt.composed_slots)

    async def _load(self, request: decoder_pb2.DecodeRequest, prompt: Prompt, deadline: float | None) -> LoadedBlocks:
        if not prompt.parts:
            return _NOTHING_LOADED
        if self._loading >= self.max_loading:
            raise OverloadedError(f"{self._loading} requests are waiting for their blocks", RETRY_AFTER_MS)
        limit = asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._loading += 1
        try:
            requests = prompt.requests
            with span("kv_fetch", request.context, blocks=len(requests)) as fetching:
                async with limit:
                    loaded = await self.loader.load(requests, fetching.traceparent)
                fetching.set(**{f"{tier}_tokens": loaded.slots(tier) for tier in TIERS})
                return loaded
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError("the deadline passed while the passages' blocks were fetched") from error
        finally:
            self._loading -= 1


def _finished(
    event: Event, finish: Finish, prompt: Prompt, composed: ComposedPrompt, fetch_seconds: float
) -> decoder_pb2.DecodeResponse:
    times = {"queue": finish.stages.queue, "kv_fetch": fetch_seconds, **vars(finish.stages)}  # in the order of the way
    return decoder_pb2.DecodeResponse(
        text=event.text,
        tokens=event.tokens,
        finish=decoder_pb2.DecodeFinish(
            reason=f"FINISH_REASON_{finish.reason.upper()}",
            usage=common_pb2.Usage(
                prompt_tokens=prompt.slots,
                cached_tokens=composed.slots("l1") + composed.slots("store") + composed.slots("disk"),
                l1_tokens=composed.slots("l1"),
                store_tokens=composed.slots("store"),
                disk_tokens=composed.slots("disk"),
                encoded_tokens=composed.slots("encoded"),
                prefill_tokens=len(prompt.token_ids),
                completion_tokens=finish.completion_tokens,
                compressed_chunks=sum(part.expanded.count(False) for part in prompt.parts),
            ),
            stages=[common_pb2.StageTime(stage=stage, milliseconds=1000 * seconds) for stage, seconds in times.items()],
            blocks=[common_pb2.BlockSlots(**part) for part in composed.found],  # type: ignore[arg-type]
        ),
    )


def _observe_pace(event: Event, last: float, mode: str) -> float:
    now = time.monotonic()
    if event.tokens > 0:
        metrics.INTER_TOKEN_LATENCY_SECONDS.observe((now - last) / event.tokens, attention_mode=mode)
    return now


_WARM_UP_TOKENS = 64


def assemble(bundle: Bundle, model: SlotModel, source: BlockSource, settings: Settings) -> DecodeService:
    """A decoder of ``bundle``, whose weights are ``model``, with blocks from ``source``.

    ``engine.start()`` sets it going, ``engine.stop()`` ends it.
    """
    decoder = settings.decoder
    limits = EngineLimits(
        max_sequences=decoder.max_sequences,
        max_waiting=decoder.max_waiting,
        max_batch_tokens=decoder.max_batch_tokens,
        slots=decoder.slots,
        several_tenants=settings.gateway.asks_for_keys,
    )
    detokenizers = detokenizer_factory(bundle.load_tokenizer(), bundle.template.answer_prefix)
    engine = Engine(model, limits, detokenizers, threads=decoder.threads)
    l1 = L1Cache(decoder.l1_mb * MIB, decoder.l1_ttl_s)
    loader = BlockLoader(l1, source, model.to_resident)
    model_status = GetDecoderStatusResponse(
        bundle_name=bundle.name,
        bundle_fingerprint=bundle.fingerprint,
        max_positions=model.max_positions,
        device=str(model.device),
        compute_dtype=str(model.compute_dtype).removeprefix("torch."),
        weights=model.weights,
        kv_dtype=str(model.kv_dtype).removeprefix("torch."),
        slot_bytes=model.slot_bytes,
    )
    # As many may wait for their blocks as may wait for a place or run: no more could be served after it anyway.
    max_loading = decoder.max_waiting + decoder.max_sequences
    return DecodeService(
        engine,
        loader,
        l1,
        configured_keys(settings, bundle),
        CostMeters(),
        model_status,
        vocab_size=model.vocab_size,
        chunk_tokens=bundle.chunk_tokens if bundle.refrag is not None else 0,
        max_loading=max_loading,
    )


def warm_up(model: SlotModel) -> None:
    """Run a prefill and a decode step, so that no request pays for what happens once. Before the engine starts."""
    tokens = min(_WARM_UP_TOKENS, model.max_positions // 2)
    if tokens < 2:
        return
    blocks = [model.to_resident(block) for block in model.encode([[0] * tokens], ["warm-up"])]
    state = model.new_sequence(blocks, tokens)
    model.forward([(state, [0] * (tokens - 1))])
    model.forward([(state, [0])])
    state.release()


def check_engine(engine: Engine, max_step_s: float) -> None:
    """Raises RuntimeError when the engine's thread ended or hangs in a step; who waits for it is told before."""
    if engine.failure is None and engine.step_seconds > max_step_s:
        engine.give_up(f"a step has taken more than {max_step_s:g} s")
    if engine.failure is not None:
        raise RuntimeError("the engine's thread failed") from engine.failure
