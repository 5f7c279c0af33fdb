"""A Qdrant server: what only it does. The rest is in test_index."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from qdrant_client import AsyncQdrantClient
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_client.http.models import VersionInfo

from blockrag.errors import NotFoundError, SettingsError, UnavailableError
from blockrag.retriever.server import ServerIndex
from blockrag.retriever.server_points import MODEL_POINT
from blockrag.retriever.vector_index import COMMITS_WITHIN_S, Counts, EmbeddingInfo
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


class Dying(AsyncQdrantClient):
    """A client whose process dies before its n-th change."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.changes_left = 10**9

    async def _change(self) -> None:
        self.changes_left -= 1
        if self.changes_left < 0:
            raise ConnectionResetError("died")

    async def upsert(self, *arguments: Any, **options: Any) -> Any:
        await self._change()
        return await super().upsert(*arguments, **options)

    async def set_payload(self, *arguments: Any, **options: Any) -> Any:
        await self._change()
        return await super().set_payload(*arguments, **options)

    async def delete_payload(self, *arguments: Any, **options: Any) -> Any:
        await self._change()
        return await super().delete_payload(*arguments, **options)

    async def delete(self, *arguments: Any, **options: Any) -> Any:
        await self._change()
        return await super().delete(*arguments, **options)


@pytest.mark.parametrize("removing", [False, True])
@pytest.mark.parametrize("changes", range(7))
async def test_what_died_half_way_shows_one_state_and_is_swept(
    changes: int, removing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows A1 and A1b, where the other caller never comes back."""
    client = Dying()
    index = ServerIndex(client, EMBEDDING, "memory")
    await index.stage(HOME, [embedded("a", "v1", number) for number in range(3)])
    await index.commit(HOME, document("a", "v1", 3))
    await index.stage(HOME, [embedded("a", "v2", number) for number in range(2)])
    client.changes_left = changes
    died = False
    try:
        await (index.remove_document(HOME, "a") if removing else index.commit(HOME, document("a", "v2", 2)))
    except UnavailableError:
        died = True
    client.changes_left = 10**9

    async def agrees() -> None:
        found = {item.passage.version: 0 for item in await index.search(HOME, query())}
        listed = {item.version: item.passages for item in await index.documents(HOME, "", 10)}
        assert list(found) == list(listed)
        for version, passages in listed.items():
            assert [item.version for item in await index.passages(HOME, ["a"])] == [version] * passages
            assert len(await index.search(HOME, query())) == passages

    await agrees()
    assert died or changes >= 4
    later = time.time() + 2 * COMMITS_WITHIN_S
    monkeypatch.setattr("blockrag.retriever.server.time.time", lambda: later)
    await index.sweep(older_than_s=COMMITS_WITHIN_S)
    await agrees()
    listed = await index.documents(HOME, "", 10)
    assert await index.counts(HOME) == Counts(len(listed), sum(item.passages for item in listed))
    # Nothing is left but what is shown: the entry, the model, the passages.
    left = await client.count("blockrag.public.default", exact=True)
    assert left.count == 1 + len(listed) + sum(item.passages for item in listed)
    await index.stage(HOME, [embedded("a", "v3", 0)])
    await index.commit(HOME, document("a", "v3", 1))
    assert {item.passage.version for item in await index.search(HOME, query())} == {"v3"}
    await index.close()


async def test_pages_of_a_listing_read_the_ids_once(client: AsyncQdrantClient) -> None:
    index = ServerIndex(client, EMBEDDING, "memory")
    for number in range(9):
        await index.stage(HOME, [embedded(f"d{number}", "v1", 0)])
        await index.commit(HOME, document(f"d{number}", "v1", 1))
    scrolls = []
    scroll = client.scroll

    async def counted(*arguments: Any, **options: Any) -> Any:
        scrolls.append(arguments)
        return await scroll(*arguments, **options)

    client.scroll = counted  # type: ignore[method-assign]
    pages, after = [], ""
    while page := [item.document_id for item in await index.documents(HOME, after, 2)]:
        pages.append(page)
        after = page[-1]
        if len(pages) == 2:
            await index.remove_document(HOME, "d5")
            scrolls.clear()
    assert pages == [["d0", "d1"], ["d2", "d3"], ["d4", "d6"], ["d7", "d8"]]
    assert scrolls == []


async def test_a_server_without_conditional_changes_is_refused() -> None:
    class Old(AsyncQdrantClient):
        async def info(self) -> Any:
            return VersionInfo(title="qdrant", version="1.15.4")

    index = ServerIndex(Old(":memory:"), EMBEDDING, "somewhere")
    with pytest.raises(SettingsError, match=r"1\.15\.4; at least 1\.16"):
        await index.stage(HOME, [embedded("a", "v1", 0)])
    await index.close()


async def test_a_collection_of_an_older_format_is_refused(client: AsyncQdrantClient) -> None:
    index = ServerIndex(client, EMBEDDING, "memory")
    await index.stage(HOME, [embedded("a", "v1", 0)])
    await client.set_payload("blockrag.public.default", {"format": 1}, points=[MODEL_POINT])
    with pytest.raises(SettingsError, match="its format is 1, not 2"):
        await index.search(HOME, query())
