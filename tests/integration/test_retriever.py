"""The retriever in the running system, over gRPC."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from blockrag.v1 import common_pb2
from blockrag.v1 import retriever_pb2 as pb
from blockrag.v1.retriever_pb2_grpc import RetrieverServiceStub
from tests.integration.conftest import Cluster

METADATA = (("application", "retriever"),)
CONTEXT = common_pb2.RequestContext(request_id="test", tenant="public")
TEXTS = ["Oslo is the capital of Norway.", "Glaciers cut the deep fjords.", "Salmon is bred along the coast."]
_NAMES = (f"retriever-{number}" for number in itertools.count())


@pytest.fixture
async def rpc(cluster: Cluster) -> AsyncIterator[RetrieverServiceStub]:
    async with grpc.aio.insecure_channel(cluster.target) as channel:
        yield RetrieverServiceStub(channel)


@pytest.fixture
def collection() -> str:
    return next(_NAMES)


async def stage(rpc: RetrieverServiceStub, collection: str, version: str, texts: list[str]) -> int:
    passages = [
        common_pb2.Passage(
            document_id="norway.txt", document_version=version, ordinal=ordinal, title="Norway", text=text
        )
        for ordinal, text in enumerate(texts)
    ]
    request = pb.AddPassagesRequest(context=CONTEXT, collection=collection, passages=passages)
    return (await rpc.AddPassages(request, metadata=METADATA)).added


async def commit(rpc: RetrieverServiceStub, collection: str, version: str, passages: int) -> pb.CommitDocumentResponse:
    request = pb.CommitDocumentRequest(
        context=CONTEXT,
        collection=collection,
        document_id="norway.txt",
        version=version,
        title="Norway",
        passages=passages,
    )
    return await rpc.CommitDocument(request, metadata=METADATA)


async def search(rpc: RetrieverServiceStub, collection: str, query: str = "capital of Norway") -> list[str]:
    request = pb.SearchRequest(context=CONTEXT, collection=collection, query=query, top_k=10)
    response = await rpc.Search(request, metadata=METADATA, wait_for_ready=True)
    return [passage.text for passage in response.passages]


async def test_a_document_from_staging_to_removal(rpc: RetrieverServiceStub, collection: str) -> None:
    assert await stage(rpc, collection, "v1", TEXTS) == 3
    assert await search(rpc, collection) == []
    assert (await commit(rpc, collection, "v1", 3)).replaced_version == ""
    assert (await search(rpc, collection))[0] == TEXTS[0]
    assert (await search(rpc, collection, "valleys made by ice"))[0] == TEXTS[1]

    await stage(rpc, collection, "v2", ["Bergen was the capital of Norway."])
    replaced = await commit(rpc, collection, "v2", 1)
    assert replaced.replaced_version == "v1"
    assert await search(rpc, collection) == ["Bergen was the capital of Norway."]

    request = pb.RemoveCollectionRequest(context=CONTEXT, collection=collection)
    removed = await rpc.RemoveCollection(request, metadata=METADATA)
    assert (removed.documents, removed.passages) == (1, 1)


async def test_errors_have_their_status(rpc: RetrieverServiceStub, collection: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await search(rpc, collection)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert collection in str(caught.value.details())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await search(rpc, "no/slash")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await stage(rpc, collection, "v1", TEXTS[:2])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await commit(rpc, collection, "v1", 3)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "only 2 of 3" in str(caught.value.details())


async def search_when_back(rpc: RetrieverServiceStub, collection: str) -> list[str]:
    """The next replica waits until the killed one's index process has let the files go."""
    async with asyncio.timeout(90):
        while True:
            try:
                return await search(rpc, collection)
            except grpc.aio.AioRpcError as error:
                # HAProxy says UNKNOWN (HTTP 500) while no replica is there.
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN), error.details()
                await asyncio.sleep(0.2)


def replica_pid(cluster: Cluster) -> int:
    """The replica is the parent of the process that holds the index."""
    worker = int((cluster.settings.state_path / "index" / "lock").read_text())
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


async def test_documents_survive_a_killed_replica(cluster: Cluster, rpc: RetrieverServiceStub, collection: str) -> None:
    await stage(rpc, collection, "v1", TEXTS)
    await commit(rpc, collection, "v1", 3)
    await stage(rpc, collection, "v2", TEXTS[:1])
    killed = replica_pid(cluster)
    os.kill(killed, signal.SIGKILL)

    found = await search_when_back(rpc, collection)
    assert sorted(found) == sorted(TEXTS)
    await stage(rpc, collection, "v2", TEXTS[:2])
    assert (await commit(rpc, collection, "v2", 2)).replaced_version == "v1"
    assert sorted(await search(rpc, collection)) == sorted(TEXTS[:2])
    assert replica_pid(cluster) != killed


async def test_the_status_names_the_model(rpc: RetrieverServiceStub) -> None:
    status = await rpc.GetRetrieverStatus(pb.GetRetrieverStatusRequest(), metadata=METADATA)

    assert (status.backend, status.embedding_model, status.dimensions) == ("edge", "all-MiniLM-L6-v2", 384)
