"""All parts of a decoder put together: in a Serve replica, in tests, in a program without a cluster.

>>> runtime = assemble(bundle, model, EncodingBlockSource(model), Settings())
>>> runtime.engine.start()
>>> async for message in runtime.service.decode(request): ...
"""

from __future__ import annotations

from dataclasses import dataclass

from blockrag.configured import configured_keys
from blockrag.decoder.block_loading import BlockLoader
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.decoder.engine import Engine
from blockrag.decoder.l1 import L1Cache
from blockrag.decoder.prefill_cost import PrefillMeter
from blockrag.decoder.scheduler import EngineLimits
from blockrag.decoder.service import DecodeService
from blockrag.kv_cache.shard_messages import BlockSource
from blockrag.limits import MIB
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.settings import Settings
from blockrag.v1.decoder_pb2 import GetDecoderStatusResponse

_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Runtime:
    """A decoder's parts. ``engine.start()`` sets it going, ``engine.stop()`` ends it."""

    service: DecodeService
    engine: Engine
    loader: BlockLoader
    l1: L1Cache
    meter: PrefillMeter


def assemble(bundle: Bundle, model: SlotModel, source: BlockSource, settings: Settings) -> Runtime:
    """A decoder of ``bundle``, whose weights are ``model``, with blocks from ``source``."""
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
    meter = PrefillMeter()
    # As many may wait for their blocks as may wait for a place or run: no more could be served after it anyway.
    max_loading = decoder.max_waiting + decoder.max_sequences
    service = DecodeService(
        engine,
        loader,
        l1,
        configured_keys(settings, bundle),
        meter,
        model_status,
        vocab_size=model.vocab_size,
        chunk_tokens=bundle.chunk_tokens if bundle.refrag is not None else 0,
        max_loading=max_loading,
    )
    return Runtime(service, engine, loader, l1, meter)


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
