"""Objects of Ray's store: reading them zero-copy, and waiting for one without fetching it."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from blockrag.types import CachedBlock

_READ_TIMEOUT_S = 10.0
"""An object that takes longer to read than this is encoded anew."""


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


async def exists(ref: Any) -> None:
    """Returns when the object, or the error in its place, exists somewhere; fetches nothing."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    stop = ref._on_ready(lambda _error: loop.call_soon_threadsafe(done.set))
    try:
        await done.wait()
    finally:
        stop()
