"""The way to the shards from other processes: their handles, with our errors instead of Ray's; and their objects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from blockrag.aio import forwarded
from blockrag.errors import UnavailableError
from blockrag.grpc_status import as_known_error, original_error
from blockrag.kv_cache.fetching import BlockFetcher
from blockrag.kv_cache.shards import Shard, ShardGroup, shard_names
from blockrag.settings import Settings
from blockrag.types import CachedBlock

APP = "kv_cache"
_READ_TIMEOUT_S = 10.0
"""An object that takes longer to read than this is encoded anew."""

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class RemoteShard(Shard):
    """A ``Shard`` in another process."""

    def __init__(self, name: str, resolve: Callable[[str], DeploymentHandle[Any]]) -> None:
        """``resolve`` gives the handle by the name, when it is first needed."""
        self.name = name
        self._resolve = resolve
        self._handle: DeploymentHandle[Any] | None = None

    acquire = forwarded(Shard.acquire)
    locate = forwarded(Shard.locate)
    warm = forwarded(Shard.warm)
    report_lost = forwarded(Shard.report_lost)
    purged_since = forwarded(Shard.purged_since)
    set_pins = forwarded(Shard.set_pins)
    purge = forwarded(Shard.purge)
    stats = forwarded(Shard.stats)

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What the shard's method answers; our errors instead of Ray's."""
        return await translated(self.name, self._send(method, *arguments, **named))

    async def _send(self, method: str, *arguments: Any, **named: Any) -> Any:
        if self._handle is None:
            # References must not travel by Serve's gRPC transport: it would keep them for ever.
            self._handle = self._resolve(self.name).options(_by_reference=True)
        return await getattr(self._handle, method).remote(*arguments, **named)


def shard_group(names: Sequence[str], resolve: Callable[[str], DeploymentHandle[Any]]) -> ShardGroup:
    """All shards, by their names."""
    return ShardGroup([RemoteShard(name, resolve) for name in names], names)


def connect_shards(settings: Settings) -> ShardGroup:
    """The shards, for a replica of another service; they are looked up when they are first needed."""
    return shard_group(shard_names(settings.kv_cache.shards), partial(serve.get_deployment_handle, app_name=APP))


def connect(settings: Settings) -> BlockFetcher:
    """The shards' blocks, for a replica of another service."""
    return BlockFetcher(connect_shards(settings), read_objects)


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


async def read_objects(refs: list[Any], timeout_s: float) -> list[CachedBlock | None]:
    """Objects of the store, zero-copy, in one call; None for what is lost, late or damaged."""
    # In a thread: an object of another node, or one that was spilled, takes its time.
    return await asyncio.to_thread(_read_intact, refs, min(timeout_s, _READ_TIMEOUT_S))


def _read_intact(refs: list[Any], timeout_s: float) -> list[CachedBlock | None]:
    blocks = _read_objects(refs, timeout_s)
    for place, block in enumerate(blocks):
        if block is not None and not block.intact:
            _logger.error("block %s was changed in the object store; it is made anew", block.key)
            blocks[place] = None
    return blocks


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


async def exists(ref: Any) -> None:
    """Returns when the object, or the error in its place, exists somewhere; fetches nothing."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    stop = ref._on_ready(lambda _error: loop.call_soon_threadsafe(done.set))
    try:
        await done.wait()
    finally:
        stop()
