"""The encoder pool as a Serve application: an ingress for clients of gRPC, and the pool that the cache calls.

They are two deployments because Serve refuses a router of one's own on an ingress behind HAProxy.
"""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import ray
from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from blockrag.access import Access
from blockrag.aio import gather_or_cancel
from blockrag.configured import configured_bundle, configured_device
from blockrag.encoder.blocks import BlockEncoder
from blockrag.errors import InvalidRequestError
from blockrag.grpc_status import rpc
from blockrag.kv_cache.requests import block_form
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.types import BlockKV, BlockRequest, CachedBlock
from blockrag.v1 import common_pb2, encoder_pb2

MOST_BLOCKS = 64
"""Blocks of one ``EncodeBlocks`` call."""
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class EncoderPool:
    """A replica that encodes; the cache's shards call ``encode_block``."""

    def __init__(self, settings: Settings) -> None:
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


class Encoder:
    """Serves ``blockrag.v1.EncoderService`` with one replica of the pool for each call."""

    def __init__(self, pool: DeploymentHandle[Any], settings: Settings) -> None:
        setup_telemetry("encoder", settings)
        self.access = Access(settings)
        self._pool = pool

    @rpc
    async def EncodeBlocks(
        self, request: encoder_pb2.EncodeBlocksRequest, grpc_context: RayServegRPCContext | None = None
    ) -> encoder_pb2.EncodeBlocksResponse:
        """Encodes blocks and describes them."""
        return cast("encoder_pb2.EncodeBlocksResponse", await self._pool.encode_blocks.remote(request))

    @rpc
    async def GetEncoderStatus(
        self, request: encoder_pb2.GetEncoderStatusRequest, grpc_context: RayServegRPCContext | None = None
    ) -> encoder_pb2.GetEncoderStatusResponse:
        """Describes a replica."""
        return cast("encoder_pb2.GetEncoderStatusResponse", await self._pool.status.remote())


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    encoder = settings.encoder
    pool = serve.deployment(
        # Twice a full forward pass of short blocks may wait in a replica; the rest waits with its callers.
        max_ongoing_requests=max(64, 4 * encoder.target_ongoing_requests),
        autoscaling_config={
            "min_replicas": encoder.min_replicas,
            "max_replicas": max(encoder.min_replicas, encoder.max_replicas),
            "target_ongoing_requests": encoder.target_ongoing_requests,
        },
        request_router_config={"request_router_class": _ROUTER},
        health_check_period_s=2,
        ray_actor_options={"num_cpus": encoder.num_cpus, "num_gpus": encoder.num_gpus},
    )(EncoderPool).bind(settings)
    ingress = serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})
    return ingress(Encoder).bind(pool, settings)
