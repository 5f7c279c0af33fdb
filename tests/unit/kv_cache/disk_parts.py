"""Blocks as files in tests: small ones with real keys, and a tier over a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blockrag.keys import KeyMaker
from blockrag.kv_cache.disk import DiskTier
from blockrag.kv_cache.shard import document_of
from blockrag.kv_cache.shard_messages import EncodedObject
from blockrag.types import FULL, BlockForm, BlockKV, BlockRequest, CachedBlock, ChunkEmbeddings

KEYS = KeyMaker("fingerprint", b"secret", "compression")
FILE_BYTES = 4096
"""What a small block's file takes of a disk."""


def wanted(
    number: int,
    document_id: str = "d",
    *,
    tenant: str = "t",
    collection: str = "c",
    form: BlockForm = FULL,
    keys: KeyMaker = KEYS,
) -> BlockRequest:
    """A request for the block of a few tokens that follow from ``number``."""
    ids = np.arange(number, number + 5, dtype=np.int32)
    return BlockRequest(keys.block_key(tenant, ids, form), ids, tenant, collection, document_id, form=form)


def block_of(request: BlockRequest) -> CachedBlock:
    """A block with content that follows from its key."""
    random = np.random.default_rng(int(request.key[:8], 16))
    if request.form.kind == "chunks":
        rows = random.standard_normal((request.size, 6), dtype=np.float32)
        return ChunkEmbeddings(request.key, request.token_ids, rows)
    keys, values = random.integers(0, 2**16, (2, 2, 1, request.size, 4), dtype=np.uint16)
    return BlockKV(request.key, request.token_ids, keys, values)


def arrays_of(block: CachedBlock) -> list[Any]:
    return [block.keys, block.values, *(block.scales or ())] if isinstance(block, BlockKV) else [block.embeddings]


def assert_same_block(found: CachedBlock, expected: CachedBlock) -> None:
    assert (type(found), found.key) == (type(expected), expected.key)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    for one, other in zip(arrays_of(found), arrays_of(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


def as_object(block: CachedBlock) -> EncodedObject:
    """Blocks stand for their objects."""
    return EncodedObject(block, block.nbytes + block.token_ids.nbytes)


async def read(ref: Any) -> CachedBlock | None:
    found: CachedBlock | None = ref
    return found


def open_tier(root: Path, blocks: int = 1000, *, keys: KeyMaker = KEYS, **options: Any) -> DiskTier:
    return DiskTier(root, blocks * FILE_BYTES, keys, put=as_object, read=read, **options)


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


async def keep(tier: DiskTier, request: BlockRequest, encode_s: float = 1.0, *, evict: bool = True) -> None:
    tier.offer(request, as_object(block_of(request)), document_of(request), encode_s, evict=evict)
    await tier.settled()


async def found(tier: DiskTier, request: BlockRequest) -> bool:
    loaded = await tier.load(request, document_of(request))
    if loaded is None:
        return False
    assert_same_block(loaded[0].ref, block_of(request))
    return True
