"""A replica of the encoder pool, apart from its ingress. Torch and the model come with the replica alone."""

from __future__ import annotations

import time

import numpy as np
import ray

from blockrag.aio import gather_or_cancel
from blockrag.configured import configured_bundle, configured_device
from blockrag.errors import InvalidRequestError
from blockrag.kv_cache.block_requests import block_form
from blockrag.settings import Settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.types import BlockKV, BlockRequest, CachedBlock
from blockrag.v1 import common_pb2, encoder_pb2

MOST_BLOCKS = 64
"""Blocks of one ``EncodeBlocks`` call."""


class EncoderPool:
    """A replica that encodes; the cache's shards call ``encode_block``."""

    def __init__(self, settings: Settings) -> None:
        from blockrag.encoder.block_encoder import BlockEncoder
        from blockrag.modeling.model import SlotModel
        from blockrag.modeling.refrag.compression import ChunkCompressor

        setup_telemetry("encoder", settings)
        bundle = configured_bundle(settings, verify_files=True)
        self._fingerprint = bundle.fingerprint
        self._chunk_tokens = bundle.chunk_tokens if bundle.refrag is not None else 0
        device = configured_device(settings, granted=bool(ray.get_gpu_ids()))
        self._encoder = BlockEncoder(
            SlotModel.load(bundle, device=device, weights="none"),
            ChunkCompressor.load(bundle, device) if bundle.refrag is not None else None,
            max_batch_tokens=settings.encoder.max_batch_tokens,
            batch_wait_ms=settings.encoder.batch_wait_ms,
            threads=settings.encoder.threads,
        )

    async def encode_block(self, request: BlockRequest) -> CachedBlock:
        """The block in its form. The caller owns the object that this becomes, and it outlives this replica."""
        if not request.traceparent:
            return await self._encoder.encode(request)
        context = common_pb2.RequestContext(tenant=request.tenant, traceparent=request.traceparent)
        with span("encode", context, tokens=int(request.token_ids.size), form=str(request.form)):
            return await self._encoder.encode(request)

    async def encode_blocks(self, request: encoder_pb2.EncodeBlocksRequest) -> encoder_pb2.EncodeBlocksResponse:
        """Encodes blocks and describes them: to check or measure an encoder by itself."""
        if len(request.blocks) > MOST_BLOCKS:
            raise InvalidRequestError("blocks", f"{len(request.blocks)}, where at most {MOST_BLOCKS} are allowed")
        blocks = []
        for place, block in enumerate(request.blocks):
            wide = np.array(block.token_ids, dtype=np.int64)  # takes every uint32
            form = block_form(block.form, self._chunk_tokens, f"blocks[{place}].form")
            self._encoder.check(wide, form, block=f"blocks[{place}].")
            blocks.append(BlockRequest(block.key, wide.astype(np.int32), request.context.tenant, form=form))
        start = time.perf_counter()
        with span("encode_blocks", request.context, blocks=len(blocks)):
            encoded = await gather_or_cancel([self._encoder.encode(block) for block in blocks])
        return encoder_pb2.EncodeBlocksResponse(
            blocks=[
                encoder_pb2.EncodedBlock(key=block.key, slots=_size(block), bytes=block.nbytes) for block in encoded
            ],
            milliseconds=1000 * (time.perf_counter() - start),
        )

    async def status(self) -> encoder_pb2.GetEncoderStatusResponse:
        """Describes this replica."""
        stats = self._encoder.stats
        return encoder_pb2.GetEncoderStatusResponse(
            bundle_fingerprint=self._fingerprint,
            encoded_blocks=stats.items,
            encoded_tokens=stats.size,
            batches=stats.batches,
            device=str(self._encoder.model.device),
            compute_dtype=str(self._encoder.model.compute_dtype).removeprefix("torch."),
        )


def _size(block: CachedBlock) -> int:
    return block.num_slots if isinstance(block, BlockKV) else len(block.embeddings)
