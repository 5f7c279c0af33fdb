"""The encoder pool on a real cluster, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from blockrag.configured import configured_bundle
from blockrag.v1.encoder_pb2 import EncodeBlocksRequest, GetEncoderStatusRequest, TokenBlock
from blockrag.v1.encoder_pb2_grpc import EncoderServiceStub
from tests.integration.conftest import Cluster

METADATA = (("application", "encoder"),)


@pytest.fixture
async def rpc(cluster: Cluster) -> AsyncIterator[EncoderServiceStub]:
    async with grpc.aio.insecure_channel(cluster.target) as channel:
        yield EncoderServiceStub(channel)


async def test_blocks_are_encoded_together_and_described(rpc: EncoderServiceStub, cluster: Cluster) -> None:
    before = await rpc.GetEncoderStatus(GetEncoderStatusRequest(), metadata=METADATA)
    lengths = [1, 30, 7]
    blocks = [TokenBlock(key=f"k{length}", token_ids=range(20, 20 + length)) for length in lengths]
    answer = await rpc.EncodeBlocks(EncodeBlocksRequest(blocks=blocks), metadata=METADATA)
    assert [block.key for block in answer.blocks] == ["k1", "k30", "k7"]
    assert [block.slots for block in answer.blocks] == lengths
    assert len({block.bytes / block.slots for block in answer.blocks}) == 1
    assert answer.milliseconds > 0
    after = await rpc.GetEncoderStatus(GetEncoderStatusRequest(), metadata=METADATA)
    assert after.encoded_blocks - before.encoded_blocks == 3
    assert after.encoded_tokens - before.encoded_tokens == 38
    assert 1 <= after.batches - before.batches <= 3
    assert after.bundle_fingerprint == configured_bundle(cluster.settings).fingerprint
    assert after.device == "cpu"


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ([TokenBlock(key="k", token_ids=[1]), TokenBlock(key="k")], "blocks[1].token_ids: a block needs"),
        ([TokenBlock(key="k", token_ids=[10**6])], "blocks[0].token_ids: outside the vocabulary"),
        ([TokenBlock(key="k", token_ids=[2**32 - 1])], "blocks[0].token_ids: outside the vocabulary"),
        ([TokenBlock(key="k", token_ids=[1] * 20_000)], "blocks[0].token_ids: 20000 tokens"),
        ([TokenBlock(key="k", token_ids=[1])] * 65, "blocks: 65"),
    ],
)
async def test_bad_blocks_are_named(rpc: EncoderServiceStub, blocks: list[TokenBlock], named: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.EncodeBlocks(EncodeBlocksRequest(blocks=blocks), metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in str(caught.value.details())
