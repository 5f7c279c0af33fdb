"""The cache on a real cluster: objects of the object store, killed processes, the ingress over gRPC."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import warnings
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import ray

from blockrag.configured import configured_bundle
from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.block_files import block_paths
from blockrag.kv_cache.fetching import BlockFetcher
from blockrag.kv_cache.shards import owner, shard_names
from blockrag.modeling.model import SlotModel
from blockrag.types import BlockRequest, ChunkEmbeddings
from blockrag.v1.common_pb2 import PromptBlock, RequestContext
from blockrag.v1.kv_cache_pb2 import (
    DocumentRef,
    GetKvCacheStatusRequest,
    GetKvCacheStatusResponse,
    PurgeDocumentsRequest,
    SetPinsRequest,
    WarmBlocksRequest,
)
from blockrag.v1.kv_cache_pb2_grpc import KvCacheServiceStub
from tests.integration.conftest import Cluster
from tests.integration.replicas import kill, replica_pids

with warnings.catch_warnings():
    # Importing Serve warns about its own use of pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    from blockrag.kv_cache.remote import connect, read_objects

TENANT = "cache-tests"
CONTEXT = RequestContext(tenant=TENANT)
METADATA = (("application", "kv_cache"),)
_SEEDS = itertools.count()


@pytest.fixture(scope="module")
def keys(cluster: Cluster) -> KeyMaker:
    bundle = configured_bundle(cluster.settings)
    return KeyMaker(bundle.fingerprint, cluster.settings.kv_cache.secret.encode())


@pytest.fixture
async def cache(cluster: Cluster) -> BlockFetcher:
    return connect(cluster.settings)


@pytest.fixture
async def rpc(cluster: Cluster) -> AsyncIterator[KvCacheServiceStub]:
    async with grpc.aio.insecure_channel(cluster.target) as channel:
        yield KvCacheServiceStub(channel)


def fresh_blocks(keys: KeyMaker, number: int, *, tokens: int = 24, document_id: str = "") -> list[BlockRequest]:
    """Blocks that no test has asked for before."""
    random = np.random.default_rng(next(_SEEDS))
    blocks = []
    for _ in range(number):
        ids = random.integers(10, 8000, tokens, dtype=np.int32)
        collection = "c" if document_id else ""
        blocks.append(BlockRequest(keys.block_key(TENANT, ids.tolist()), ids, TENANT, collection, document_id))
    return blocks


def prompt_blocks(blocks: list[BlockRequest]) -> list[PromptBlock]:
    return [
        PromptBlock(token_ids=block.token_ids.tolist(), collection=block.collection, document_id=block.document_id)
        for block in blocks
    ]


async def status(rpc: KvCacheServiceStub) -> GetKvCacheStatusResponse:
    return await rpc.GetKvCacheStatus(GetKvCacheStatusRequest(), metadata=METADATA)


def assert_same_slots(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to one rounding to bfloat16, which numpy holds as the upper half of a float32."""
    assert found.dtype == expected.dtype == np.uint16
    values, wanted = ((half.astype(np.uint32) << 16).view(np.float32) for half in (found, expected))
    np.testing.assert_allclose(values, wanted, rtol=2**-7, atol=1e-4)


async def test_blocks_are_encoded_once_and_read_from_shared_memory(
    cache: BlockFetcher, keys: KeyMaker, cluster: Cluster
) -> None:
    # One token: so small that Ray keeps it out of the object store.
    blocks = fresh_blocks(keys, 6) + fresh_blocks(keys, 1, tokens=1)
    first = await cache.fetch(blocks)
    second = await cache.fetch(blocks)
    assert [fetched.tier for fetched in first] == ["encoded"] * 7
    assert [fetched.tier for fetched in second] == ["store"] * 7
    model = SlotModel.load(configured_bundle(cluster.settings))
    for request, fetched in zip(blocks, second, strict=True):
        [expected] = model.encode([request.token_ids.tolist()], [request.key])
        assert fetched.block.key == request.key
        np.testing.assert_array_equal(fetched.block.token_ids, request.token_ids)
        assert_same_slots(fetched.block.keys, expected.keys)
        assert_same_slots(fetched.block.values, expected.values)
        assert not fetched.block.keys.flags.writeable


async def test_a_hundred_requests_for_a_missing_block_are_one_encode(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub
) -> None:
    [block] = fresh_blocks(keys, 1, tokens=200)
    before = await status(rpc)
    answers = await asyncio.gather(*(cache.fetch([block]) for _ in range(100)))
    after = await status(rpc)
    assert {fetched.block.key for [fetched] in answers} == {block.key}
    # A reader whose object Ray lost on the way (seen once in many runs) asks again: that is a further encode, and
    # right. Without a loss there is exactly one.
    lost = after.lost - before.lost
    assert 1 <= after.misses - before.misses <= 1 + 2 * lost
    answered = after.hits + after.joined + after.misses - before.hits - before.joined - before.misses
    assert 100 <= answered <= 100 + lost
    assert after.blocks - before.blocks == 1
    assert after.bytes - before.bytes == pytest.approx(answers[0][0].block.nbytes, rel=0.01)


async def test_a_request_that_is_cancelled_leaves_the_encode_to_the_others(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub
) -> None:
    async with asyncio.timeout(60):
        while True:  # until the second caller comes while the blocks are being encoded for the first
            joined = (await status(rpc)).joined
            blocks = fresh_blocks(keys, 20, tokens=200)
            leaving, staying = (asyncio.ensure_future(cache.fetch(blocks)) for _ in range(2))
            while (found := (await status(rpc)).joined) < joined + 20 and not staying.done():
                pass
            if found == joined + 20 and leaving.cancel():
                break
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert len(await staying) == 20


@ray.remote(num_cpus=0)
class Owner:
    """Owns objects, as a shard does."""

    def own(self) -> list[ray.ObjectRef]:  # type: ignore[type-arg]
        embeddings = np.zeros((300, 300), dtype=np.float32)
        return [ray.put(ChunkEmbeddings("key", np.zeros(300, dtype=np.int32), embeddings))]

    async def never(self) -> None:
        await asyncio.Event().wait()


async def test_lost_and_late_objects_are_told_from_those_that_are_there(cluster: Cluster) -> None:
    alive, dying = Owner.remote(), Owner.remote()
    [here], [lost] = ray.get([alive.own.remote(), dying.own.remote()])
    late = alive.never.remote()
    ray.kill(dying)
    async with asyncio.timeout(60):
        # For a moment the object can still be read: also right, for it never changes.
        while (found := [each is not None for each in await read_objects([here, lost, here], 5.0)])[1]:
            assert found == [True, True, True]
    assert found == [True, False, True]
    assert [found is not None for found in await read_objects([here, late], 0.2)] == [True, False]
    assert [found is not None for found in await read_objects([here, here], 5.0)] == [True, True]
    assert await read_objects([], 5.0) == []
    ray.kill(alive)


async def test_what_the_encoder_refuses_reaches_the_caller(cache: BlockFetcher) -> None:
    block = BlockRequest("bad", np.array([5, 10**6], dtype=np.int32), TENANT)
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        await cache.fetch([block])


async def test_warming_pinning_and_purging_over_grpc(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub
) -> None:
    await cache.poll_purges()
    document = "warmed"
    blocks = fresh_blocks(keys, 10, document_id=document)
    warmed = await rpc.WarmBlocks(
        WarmBlocksRequest(context=CONTEXT, blocks=prompt_blocks(blocks), pin=True), metadata=METADATA
    )
    assert (warmed.hits, warmed.encoded, warmed.over_budget) == (0, 10, False)
    assert warmed.encoded_bytes > 10 * 24 * 3000
    again = await rpc.WarmBlocks(WarmBlocksRequest(context=CONTEXT, blocks=prompt_blocks(blocks)), metadata=METADATA)
    assert (again.hits, again.encoded) == (10, 0)
    assert [fetched.tier for fetched in await cache.fetch(blocks)] == ["store"] * 10
    references = [DocumentRef(collection="c", document_id=document)]
    pins = await rpc.SetPins(SetPinsRequest(context=CONTEXT, documents=references, pinned=False), metadata=METADATA)
    assert pins.blocks == 10
    usage = {each.tenant: each for each in (await status(rpc)).tenants}[TENANT]
    assert usage.blocks >= 10
    purged = await rpc.PurgeDocuments(PurgeDocumentsRequest(context=CONTEXT, documents=references), metadata=METADATA)
    assert purged.blocks == 10
    assert set((await cache.poll_purges()).keys) >= {block.key for block in blocks}
    assert [fetched.tier for fetched in await cache.fetch(blocks)] == ["encoded"] * 10


async def test_a_purge_removes_files_for_good(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub, cluster: Cluster
) -> None:
    blocks = fresh_blocks(keys, 6, document_id="on disk")
    await cache.fetch(blocks)
    await written(rpc)
    wanted = {block.key for block in blocks}
    assert {path.name for path in block_paths(cluster.settings.disk_path)} >= wanted
    references = [DocumentRef(collection="c", document_id="on disk")]
    purged = await rpc.PurgeDocuments(PurgeDocumentsRequest(context=CONTEXT, documents=references), metadata=METADATA)
    assert purged.blocks == 6
    assert not {path.name for path in block_paths(cluster.settings.disk_path)} & wanted
    kill(replica_pids("kv_cache", "KvCacheShard-0"))
    assert [fetched.tier for fetched in await cache.fetch(blocks)] == ["encoded"] * 6


async def test_another_tenant_cannot_purge(cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub) -> None:
    blocks = fresh_blocks(keys, 2, document_id="mine")
    await cache.fetch(blocks)
    purged = await rpc.PurgeDocuments(
        PurgeDocumentsRequest(
            context=RequestContext(tenant="somebody-else"), documents=[DocumentRef(collection="c", document_id="mine")]
        ),
        metadata=METADATA,
    )
    assert purged.blocks == 0
    assert [fetched.tier for fetched in await cache.fetch(blocks)] == ["store"] * 2


async def test_bad_requests_name_their_field(rpc: KvCacheServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.WarmBlocks(WarmBlocksRequest(blocks=[PromptBlock(token_ids=[1])]), metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "context.tenant" in str(caught.value.details())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.WarmBlocks(WarmBlocksRequest(context=CONTEXT, blocks=[PromptBlock()]), metadata=METADATA)
    assert "blocks[0].token_ids" in str(caught.value.details())


async def test_objects_survive_the_encoder_and_waiting_encodes_are_retried(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub
) -> None:
    # Ray sends results of less than 100 KB along with the reply: blocks on both sides of that.
    held = [*fresh_blocks(keys, 4, tokens=8), *fresh_blocks(keys, 4, tokens=100)]
    await rpc.WarmBlocks(WarmBlocksRequest(context=CONTEXT, blocks=prompt_blocks(held)), metadata=METADATA)
    waiting = fresh_blocks(keys, 40, tokens=200)
    pids = replica_pids("encoder", "EncoderPool")
    misses = (await status(rpc)).misses
    fetching = asyncio.ensure_future(cache.fetch(waiting))
    async with asyncio.timeout(30):
        while (await status(rpc)).misses < misses + 40:
            assert not fetching.done()
    kill(pids)
    assert not fetching.done()
    survivors = await cache.fetch(held)
    assert [fetched.tier for fetched in survivors] == ["store"] * 8
    assert [fetched.block.key for fetched in await fetching] == [block.key for block in waiting]
    assert [fetched.tier for fetched in await cache.fetch(fresh_blocks(keys, 1))] == ["encoded"]


async def written(rpc: KvCacheServiceStub) -> None:
    """Returns when every block that was encoded is on disk."""
    async with asyncio.timeout(30):
        while (await status(rpc)).disk.pending:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_dead_shard_reads_its_blocks_from_disk(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub
) -> None:
    await cache.poll_purges()
    blocks = fresh_blocks(keys, 24)
    before = {fetched.block.key: np.array(fetched.block.keys) for fetched in await cache.fetch(blocks)}
    dead = {block.key for block in blocks if owner(block.key, shard_names(2)) == 0}
    assert 0 < len(dead) < 24
    await written(rpc)
    kill(replica_pids("kv_cache", "KvCacheShard-0"))
    after = await cache.fetch(blocks)
    assert {fetched.block.key for fetched in after if fetched.tier == "disk"} == dead
    assert {fetched.tier for fetched in after if fetched.block.key not in dead} == {"store"}
    for fetched in after:
        np.testing.assert_array_equal(fetched.block.keys, before[fetched.block.key])
        assert not fetched.block.keys.flags.writeable
    assert (await cache.poll_purges()).reset
    assert not (await cache.poll_purges()).reset
    assert (await status(rpc)).shards == 2


async def test_a_byte_that_changed_in_shared_memory_is_not_read(
    cache: BlockFetcher, keys: KeyMaker, rpc: KvCacheServiceStub
) -> None:
    """The block is damaged where all processes read it; it is noticed, and made anew (here: read from disk)."""
    blocks = fresh_blocks(keys, 3)
    first = await cache.fetch(blocks)
    before = [fetched.block.keys.copy() for fetched in first]
    damaged = first[1].block.keys
    lost = (await status(rpc)).lost
    place = damaged.nbytes // 2
    byte = int(damaged.reshape(-1).view(np.uint8)[place])
    ctypes.memset(damaged.ctypes.data + place, byte ^ 4, 1)
    assert not np.array_equal(damaged, before[1])
    second = await cache.fetch(blocks)
    assert [fetched.tier for fetched in second] == ["store", "disk", "store"]
    for fetched, expected in zip(second, before, strict=True):
        np.testing.assert_array_equal(fetched.block.keys, expected)
    assert (await status(rpc)).lost - lost == 1


async def test_a_shard_that_dies_between_acquire_and_read_is_a_miss(cache: BlockFetcher, keys: KeyMaker) -> None:
    """The reader holds references whose owner is dead."""
    block = next(each for each in fresh_blocks(keys, 50) if owner(each.key, shard_names(2)) == 1)
    read = cache._read_objects
    killed: list[int] = []

    async def kill_then_read(refs: list[object], timeout_s: float) -> object:
        if not killed:
            killed.extend(replica_pids("kv_cache", "KvCacheShard-1"))
            kill(killed)
        return await read(refs, timeout_s)

    cache._read_objects = kill_then_read  # type: ignore[assignment]
    [fetched] = await cache.fetch([block])
    assert len(killed) == 1
    assert fetched.block.key == block.key
