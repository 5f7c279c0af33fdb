"""A Qdrant server: what only it does. The rest is in test_index."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from qdrant_client import AsyncQdrantClient
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from blockrag.errors import NotFoundError, SettingsError, UnavailableError
from blockrag.retriever.base import EmbeddingInfo
from blockrag.retriever.server import ServerIndex
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded, query

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


@pytest.fixture
async def client() -> AsyncIterator[AsyncQdrantClient]:
    made = AsyncQdrantClient(":memory:")
    yield made
    await made.close()


async def test_a_server_that_cannot_be_reached_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        index = ServerIndex.connect(url, "a-secret-key", EMBEDDING)
        calls = [
            index.stage(HOME, [embedded("a", "v1", 0)]),
            index.commit(HOME, document("a", "v1", 1)),
            index.search(HOME, query()),
            index.documents(HOME, "", 10),
            index.collections("public"),
            index.remove_collection(HOME),
            index.sweep(),
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match=f"vector store at {url}") as caught:
                await call
            assert "a-secret-key" not in str(caught.value)
        await index.close()


class Answers(AsyncQdrantClient):
    """A client whose server answers every search with one error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(":memory:")
        self.error = error

    async def retrieve(self, *args: object, **options: object) -> list[object]:  # type: ignore[override]
        raise self.error


def http_error(status: int) -> UnexpectedResponse:
    return UnexpectedResponse(status, "reason", b'{"status": {"error": "why"}}', httpx.Headers())


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (http_error(401), UnavailableError, "refuses the API key"),
        (http_error(403), UnavailableError, "refuses the API key"),
        (http_error(404), NotFoundError, "'default' does not exist"),
        (http_error(500), UnavailableError, "vector store at somewhere failed"),
        (ResponseHandlingException(TimeoutError("late")), UnavailableError, "vector store at somewhere"),
    ],
)
async def test_answers_of_the_server_are_translated(error: Exception, kind: type[Exception], message: str) -> None:
    index = ServerIndex(Answers(error), EMBEDDING, "somewhere")

    with pytest.raises(kind, match=message):
        await index.search(HOME, query())
    await index.close()


async def test_another_embedding_model_is_refused(client: AsyncQdrantClient) -> None:
    first = ServerIndex(client, EMBEDDING, "memory")
    await first.stage(HOME, [embedded("a", "v1", 0)])
    other = ServerIndex(client, EmbeddingInfo("other", EMBEDDING.dimensions), "memory")

    for call in (other.search(HOME, query()), other.stage(HOME, [embedded("a", "v1", 0)])):
        with pytest.raises(SettingsError, match="embedding model"):
            await call


async def test_collections_of_others_on_the_server_are_left_alone(client: AsyncQdrantClient) -> None:
    await client.create_collection("somebody.else", vectors_config={})
    await client.create_collection("blockrag.", vectors_config={})
    await client.create_collection("blockrag.Not a tenant.x", vectors_config={})

    assert await ServerIndex(client, EMBEDDING, "memory").collections(None) == []


async def test_two_replicas_share_a_server(client: AsyncQdrantClient) -> None:
    first, second = (ServerIndex(client, EMBEDDING, "memory") for _ in range(2))
    await asyncio.gather(*(index.stage(HOME, [embedded("a", "v1", 0)]) for index in (first, second)))
    await first.commit(HOME, document("a", "v1", 1))
    assert [item.passage.version for item in await second.search(HOME, query())] == ["v1"]

    await second.remove_collection(HOME)
    with pytest.raises(NotFoundError):
        await first.search(HOME, query())
    await first.stage(HOME, [embedded("b", "v1", 0)])
    await second.commit(HOME, document("b", "v1", 1))
    assert [item.passage.document_id for item in await first.search(HOME, query())] == ["b"]


async def interrupted_before_the_switch(index: ServerIndex) -> None:
    await index._client.set_payload("blockrag.public.default", {"state": "visible"}, points=_all_of("v2"))


async def interrupted_after_the_switch(index: ServerIndex) -> None:
    from blockrag.retriever.server import _entry

    await interrupted_before_the_switch(index)
    await index._client.upsert("blockrag.public.default", [_entry(document("a", "v2", 2))])


@pytest.mark.parametrize(
    ("interrupt", "visible"), [(interrupted_before_the_switch, "v1"), (interrupted_after_the_switch, "v2")]
)
async def test_a_commit_that_died_half_way_shows_one_version_only(
    client: AsyncQdrantClient, interrupt: Callable[[ServerIndex], object], visible: str
) -> None:
    index = ServerIndex(client, EMBEDDING, "memory")
    await index.stage(HOME, [embedded("a", "v1", number) for number in range(2)])
    await index.commit(HOME, document("a", "v1", 2))
    await index.stage(HOME, [embedded("a", "v2", number) for number in range(2)])
    await interrupt(index)  # type: ignore[misc]

    assert {item.passage.version for item in await index.search(HOME, query())} == {visible}
    assert {passage.version for passage in await index.passages(HOME, ["a"])} == {visible}
    await index.stage(HOME, [embedded("a", "v3", 0)])
    await index.commit(HOME, document("a", "v3", 1))
    assert {item.passage.version for item in await index.search(HOME, query())} == {"v3"}


def _all_of(version: str) -> object:
    from qdrant_client import models

    return models.Filter(must=[models.FieldCondition(key="version", match=models.MatchValue(value=version))])
