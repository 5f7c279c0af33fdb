"""A shard in another process, its handle by hand."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.kv_cache.remote import RemoteShard
from blockrag.kv_cache.shard_messages import DocumentId


class Handle:
    """Answers each method with its name and arguments, or fails."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.by_reference = False

    def options(self, *, _by_reference: bool) -> Handle:
        self.by_reference = _by_reference
        return self

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            async def remote(self, *given: Any) -> Any:
                if handle.error is not None:
                    raise handle.error
                return method, *given

        return Method()


async def test_every_method_reaches_the_shard_s_own() -> None:
    handle = Handle()
    shard = RemoteShard("shard", lambda _: handle)  # type: ignore[arg-type,return-value]
    document = DocumentId("t", "c", "d")
    calls = {
        "acquire": ([],),
        "warm": ([], True),
        "report_lost": (["k"], [3]),
        "purged_since": (5,),
        "set_pins": ([document], False),
        "purge": ([document],),
        "stats": (),
    }
    for method, given in calls.items():
        assert await getattr(shard, method)(*given) == (method, *given)
    assert handle.by_reference


async def test_a_shard_that_is_gone_is_unavailable_by_name_and_other_errors_are_kept() -> None:
    handle = Handle()
    shard = RemoteShard("KvCacheShard-1", lambda _: handle)  # type: ignore[arg-type,return-value]
    handle.error = ActorDiedError()
    with pytest.raises(UnavailableError, match=r"^KvCacheShard-1: .*went away"):
        await shard.stats()
    handle.error = InvalidRequestError("token_ids", "no")
    with pytest.raises(InvalidRequestError):
        await shard.acquire([])


async def test_a_shard_that_cannot_be_found_yet_is_unavailable() -> None:
    def resolve(_: str) -> Any:
        raise ActorDiedError()

    with pytest.raises(UnavailableError, match=r"^KvCacheShard-1: "):
        await RemoteShard("KvCacheShard-1", resolve).stats()
