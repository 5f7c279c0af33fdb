"""The cache as a Serve application: an ingress for what clients of gRPC ask, and shards that own the objects.

``connect`` gives other services their way to the shards.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError
from ray.experimental import get_local_object_locations
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from blockrag.access import protect
from blockrag.configured import configured_bundle, configured_keys
from blockrag.errors import UnavailableError
from blockrag.grpc_status import as_known_error, original_error, translate_errors
from blockrag.kv_cache.client import KvCacheClient
from blockrag.kv_cache.messages import AcquiredBlock, DocumentId, PurgeLog, ShardStats, WarmOutcome
from blockrag.kv_cache.metrics import ShardMetrics
from blockrag.kv_cache.requests import block_forms, block_requests, document_ids, status_response, warm_response
from blockrag.kv_cache.ring import HashRing, shard_names
from blockrag.kv_cache.shard import CacheShard, EncodedObject
from blockrag.kv_cache.shards import Shard, ShardGroup
from blockrag.kv_cache.store import BlockStore
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.types import BlockRequest, CachedBlock
from blockrag.v1 import common_pb2, kv_cache_pb2

APP = "kv_cache"
_MIB = 2**20
_MAX_ONGOING = 1000
"""Requests in a shard. Most wait for an encode; what bounds them is the gateway's admission."""
_READ_TIMEOUT_S = 10.0
"""An object that takes longer to read than this is encoded anew."""
_STORE_HEADROOM = 1.5

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class KvCacheShard:
    """Holds references to block KV. One replica: its objects live and die with its process."""

    def __init__(self, name: str, settings: Settings) -> None:
        setup_telemetry(APP, settings)
        cache = settings.kv_cache
        store = BlockStore(
            cache.budget_mb * _MIB // cache.shards, tenant_share=cache.tenant_share, ttl_s=float(cache.ttl_s)
        )
        self._encoder: DeploymentHandle[Any] | None = None
        self._shard = CacheShard(store, self._encode)
        self._metrics = ShardMetrics(name)

    async def acquire(self, blocks: list[BlockRequest]) -> list[AcquiredBlock]:
        """References to the blocks, in order; what is missing is encoded."""
        traceparent = next((block.traceparent for block in blocks if block.traceparent), "")
        if traceparent:
            with span("kv_acquire", common_pb2.RequestContext(traceparent=traceparent), blocks=len(blocks)) as current:
                acquired = await self._shard.acquire(blocks)
                current.set(encoded=sum(block.tier == "encoded" for block in acquired))
        else:
            acquired = await self._shard.acquire(blocks)
        self._metrics.record_acquired(blocks, acquired)
        return acquired

    async def warm(self, blocks: list[BlockRequest], pin: bool) -> WarmOutcome:
        """Has blocks held ahead of time."""
        return await self._shard.warm(blocks, pin)

    async def report_lost(self, keys: list[str], generations: list[int] | None = None) -> int:
        """Forgets blocks whose objects could not be read."""
        return self._shard.report_lost(keys, generations)

    async def purged_since(self, cursor: int) -> PurgeLog:
        """Keys purged since a reader's cursor; the decoders poll it each second."""
        self._metrics.record_stats(self._shard.stats())
        return self._shard.purged_since(cursor)

    async def lookup(self, keys: list[str]) -> list[bool]:
        """Which keys are held."""
        return self._shard.lookup(keys)

    async def set_pins(self, documents: list[DocumentId], pinned: bool) -> int:
        """Pins or unpins documents' blocks."""
        return self._shard.set_pins(documents, pinned)

    async def purge(self, documents: list[DocumentId]) -> int:
        """Forgets documents' blocks."""
        return self._shard.purge(documents)

    async def stats(self) -> ShardStats:
        """What is held, and what happened since the start."""
        return self._shard.stats()

    async def _encode(self, request: BlockRequest) -> EncodedObject:
        """Has a block encoded. This process makes the call, so it owns the object, which outlives the encoder."""
        return await _translated("encoder", self._encode_in_pool(request))

    async def _encode_in_pool(self, request: BlockRequest) -> EncodedObject:
        if self._encoder is None:
            self._encoder = serve.get_deployment_handle("EncoderPool", app_name="encoder").options(_by_reference=True)
        handle = self._encoder.options(session_id=request.key)
        response = cast("DeploymentResponse[CachedBlock]", handle.encode_block.remote(request))
        try:
            ref = await response._to_object_ref()
            await _exists(ref)
            # The owner knows where the object is and how large; fetching it here would copy it between nodes.
            location = get_local_object_locations([ref]).get(ref, {})
            if not location.get("node_ids"):
                # An error, which is raised; or a block so small that Ray sent it along instead of storing it. Put by
                # this process it is in the object store and needs no other process to stay.
                block = await ref
                return EncodedObject(ray.put(block), block.nbytes + block.token_ids.nbytes)
        except asyncio.CancelledError:
            response.cancel()
            raise
        return EncodedObject(ref, int(location["object_size"]))


class KvCache:
    """Serves ``blockrag.v1.KvCacheService`` over all shards."""

    def __init__(self, settings: Settings, *shards: DeploymentHandle[Any]) -> None:
        setup_telemetry(APP, settings)
        protect(settings)
        bundle = configured_bundle(settings)
        self._keys = configured_keys(settings, bundle)
        self._chunk_tokens = bundle.chunk_tokens if bundle.refrag is not None else 0
        self._budget_bytes = settings.kv_cache.budget_mb * _MIB
        names = shard_names(len(shards))
        self._shards = _shard_group({name: partial(_same, shard) for name, shard in zip(names, shards, strict=True)})
        _warn_of_small_store(self._budget_bytes)

    @translate_errors
    async def GetKvCacheStatus(
        self, request: kv_cache_pb2.GetKvCacheStatusRequest, grpc_context: RayServegRPCContext | None = None
    ) -> kv_cache_pb2.GetKvCacheStatusResponse:
        """Sums up the shards that answer in time."""
        return status_response(await self._shards.stats(), self._budget_bytes)

    @translate_errors
    async def WarmBlocks(
        self, request: kv_cache_pb2.WarmBlocksRequest, grpc_context: RayServegRPCContext | None = None
    ) -> kv_cache_pb2.WarmBlocksResponse:
        """Encodes blocks ahead of time, in every form asked for."""
        forms = block_forms(request.forms, self._chunk_tokens)
        with span("warm_blocks", request.context, blocks=len(request.blocks), forms=len(forms)) as current:
            by_form = [block_requests(self._keys, request.context, request.blocks, form) for form in forms]
            outcome = await self._shards.warm(list(itertools.chain.from_iterable(by_form)), request.pin)
            response = warm_response(by_form, outcome)
            current.set(hits=response.hits, encoded=response.encoded)
        return response

    @translate_errors
    async def LookupBlocks(
        self, request: kv_cache_pb2.LookupBlocksRequest, grpc_context: RayServegRPCContext | None = None
    ) -> kv_cache_pb2.LookupBlocksResponse:
        """Says which keys are held."""
        return kv_cache_pb2.LookupBlocksResponse(held=await self._shards.lookup(list(request.keys)))

    @translate_errors
    async def SetPins(
        self, request: kv_cache_pb2.SetPinsRequest, grpc_context: RayServegRPCContext | None = None
    ) -> kv_cache_pb2.SetPinsResponse:
        """Pins or unpins documents' blocks in all shards."""
        documents = document_ids(request.context, request.documents)
        with span("set_pins", request.context, documents=len(documents)):
            return kv_cache_pb2.SetPinsResponse(blocks=await self._shards.set_pins(documents, request.pinned))

    @translate_errors
    async def PurgeDocuments(
        self, request: kv_cache_pb2.PurgeDocumentsRequest, grpc_context: RayServegRPCContext | None = None
    ) -> kv_cache_pb2.PurgeDocumentsResponse:
        """Forgets documents' blocks in all shards; the decoders follow within their polling interval."""
        documents = document_ids(request.context, request.documents)
        with span("purge", request.context, documents=len(documents)):
            return kv_cache_pb2.PurgeDocumentsResponse(blocks=await self._shards.purge(documents))


class _RemoteShard:
    """The methods of a shard, called through its deployment handle, with our errors instead of Ray's."""

    def __init__(self, name: str, resolve: Callable[[], DeploymentHandle[Any]]) -> None:
        self._name = name
        self._resolve = resolve
        self._handle: DeploymentHandle[Any] | None = None

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        return partial(self._call, method)

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await _translated(self._name, self._send(method, *arguments))

    async def _send(self, method: str, *arguments: Any) -> Any:
        if self._handle is None:
            # References must not travel by Serve's gRPC transport: it would keep them for ever.
            self._handle = self._resolve().options(_by_reference=True)
        return await getattr(self._handle, method).remote(*arguments)


def _shard_group(resolvers: Mapping[str, Callable[[], DeploymentHandle[Any]]]) -> ShardGroup:
    shards = [cast(Shard, _RemoteShard(name, resolve)) for name, resolve in resolvers.items()]
    return ShardGroup(shards, HashRing(list(resolvers)))


def connect(settings: Settings) -> KvCacheClient:
    """A client for a replica of another service; shards are looked up when they are first needed."""
    names = shard_names(settings.kv_cache.shards)
    resolvers = {name: partial(serve.get_deployment_handle, name, app_name=APP) for name in names}
    return KvCacheClient(_shard_group(resolvers), read_objects)


async def read_objects(refs: list[Any], timeout_s: float) -> list[CachedBlock | None]:
    """Objects of the store, zero-copy, in one call; None for what is lost or late."""
    # In a thread: an object of another node, or one that was spilled, takes its time.
    return await asyncio.to_thread(_read_objects, refs, min(timeout_s, _READ_TIMEOUT_S))


def _read_objects(refs: list[Any], timeout_s: float) -> list[CachedBlock | None]:
    try:
        return list(ray.get(refs, timeout=timeout_s))
    except (ObjectLostError, GetTimeoutError):
        distinct = list(set(refs))
        here = set(ray.wait(distinct, num_returns=len(distinct), timeout=0)[0])
        return [_read_object(ref) if ref in here else None for ref in refs]


def _read_object(ref: Any) -> CachedBlock | None:
    try:
        block: CachedBlock = ray.get(ref, timeout=_READ_TIMEOUT_S)
    except (ObjectLostError, GetTimeoutError):
        return None
    return block


async def _exists(ref: Any) -> None:
    """Returns when the object, or the error in its place, exists somewhere; fetches nothing."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    stop = ref._on_ready(lambda _error: loop.call_soon_threadsafe(done.set))
    try:
        await done.wait()
    finally:
        stop()


async def _translated(name: str, call: Awaitable[T]) -> T:
    """The call's result; what Ray raises for a replica that is gone becomes an ``UnavailableError`` naming it."""
    try:
        return await call
    except Exception as error:
        known = as_known_error(error)
        if known is None and isinstance(original_error(error), RayError | RayServeException):
            known = UnavailableError(f"{type(error).__name__}: {error}")
        if isinstance(known, UnavailableError):
            raise UnavailableError(f"{name}: {known}") from error
        raise (known or original_error(error)) from error


def _same(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    return handle


def _warn_of_small_store(budget_bytes: int) -> None:
    resources: dict[str, float] = ray.cluster_resources()
    available = resources.get("object_store_memory", 0.0)
    if budget_bytes * _STORE_HEADROOM > available:
        _logger.warning(
            "kv_cache.budget_mb is %d MiB and the cluster's object stores have %d MiB: past them blocks spill to disk; "
            "keep the budget under two thirds",
            budget_bytes // _MIB,
            int(available) // _MIB,
        )


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    shards = [
        serve.deployment(
            name=name,
            num_replicas=1,
            max_ongoing_requests=_MAX_ONGOING,
            health_check_period_s=2,
            ray_actor_options={"num_cpus": 0.1},
        )(KvCacheShard).bind(name, settings)
        for name in shard_names(settings.kv_cache.shards)
    ]
    return serve.deployment(
        num_replicas=1, max_ongoing_requests=_MAX_ONGOING, health_check_period_s=2, ray_actor_options={"num_cpus": 0.1}
    )(KvCache).bind(settings, *shards)
