"""The way to the shards from other processes: their handles, with our errors instead of Ray's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from blockrag.errors import UnavailableError
from blockrag.grpc_status import as_known_error, original_error
from blockrag.kv_cache.client import KvCacheClient
from blockrag.kv_cache.messages import AcquiredBlock, DocumentId, PurgeLog, ShardStats, WarmOutcome
from blockrag.kv_cache.objects import read_objects
from blockrag.kv_cache.shards import Shard, ShardGroup, shard_names
from blockrag.settings import Settings
from blockrag.types import BlockRequest

APP = "kv_cache"

P = ParamSpec("P")
T = TypeVar("T")


class RemoteShard:
    """A ``Shard`` in another process."""

    def __init__(self, name: str, resolve: Callable[[], DeploymentHandle[Any]]) -> None:
        """``resolve`` gives the handle, when it is first needed."""
        self._name = name
        self._resolve = resolve
        self._handle: DeploymentHandle[Any] | None = None

    async def acquire(self, blocks: list[BlockRequest]) -> list[AcquiredBlock]:
        return await self._call(Shard.acquire, blocks)

    async def warm(self, blocks: list[BlockRequest], pin: bool) -> WarmOutcome:
        return await self._call(Shard.warm, blocks, pin)

    async def report_lost(self, keys: list[str], generations: list[int] | None = None) -> int:
        return await self._call(Shard.report_lost, keys, generations)

    async def purged_since(self, cursor: int) -> PurgeLog:
        return await self._call(Shard.purged_since, cursor)

    async def set_pins(self, documents: list[DocumentId], pinned: bool) -> int:
        return await self._call(Shard.set_pins, documents, pinned)

    async def purge(self, documents: list[DocumentId]) -> int:
        return await self._call(Shard.purge, documents)

    async def stats(self) -> ShardStats:
        return await self._call(Shard.stats)

    async def _call(
        self, method: Callable[Concatenate[Shard, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        async def send() -> T:
            if self._handle is None:
                # References must not travel by Serve's gRPC transport: it would keep them for ever.
                self._handle = self._resolve().options(_by_reference=True)
            answer: T = await getattr(self._handle, method.__name__).remote(*args, **kwargs)
            return answer

        return await translated(self._name, send())


def shard_group(resolvers: Mapping[str, Callable[[], DeploymentHandle[Any]]]) -> ShardGroup:
    """All shards, by their names."""
    return ShardGroup([RemoteShard(name, resolve) for name, resolve in resolvers.items()], list(resolvers))


def connect(settings: Settings) -> KvCacheClient:
    """A client for a replica of another service; shards are looked up when they are first needed."""
    names = shard_names(settings.kv_cache.shards)
    resolvers = {name: partial(serve.get_deployment_handle, name, app_name=APP) for name in names}
    return KvCacheClient(shard_group(resolvers), read_objects)


async def translated(name: str, call: Awaitable[T]) -> T:
    """The call's result; what Ray raises for a replica that is gone becomes an ``UnavailableError`` naming it."""
    try:
        return await call
    except Exception as error:
        known = as_known_error(error)
        if known is None and isinstance(original_error(error), RayError | RayServeException):
            known = UnavailableError(f"{type(error).__name__}: {error}")
        if isinstance(known, UnavailableError):
            raise type(known)(f"{name}: {known}") from error
        raise (known or original_error(error)) from error
