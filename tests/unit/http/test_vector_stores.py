"""Files and vector stores over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from blockrag.errors import NotFoundError
from blockrag.settings import GatewaySettings, Settings
from blockrag.v1.common_pb2 import Passage

from .standin import StandIn, served

TEXT = b"Fiji is a country. The capital of Fiji is Suva."


async def upload(client: httpx.AsyncClient, name: str, collection: str, **options: Any) -> dict[str, Any]:
    data = {"purpose": "assistants", "blockrag": json.dumps({"collection": collection, **options})}
    response = await client.post("/v1/files", files={"file": (name, TEXT)}, data=data)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_a_document_from_upload_to_deletion(client: httpx.AsyncClient, gateway: StandIn) -> None:
    stored = await upload(client, "fiji.txt", "notes", metadata={"land": "fj"})

    assert (stored["id"], stored["object"], stored["status"]) == ("notes/fiji.txt", "file", "processed")
    assert stored["blockrag"]["passages"] == 1
    assert gateway.index.documents[("notes", "fiji.txt")].metadata["land"] == "fj"
    for quoted in ("notes/fiji.txt", "notes%2Ffiji.txt"):
        assert (await client.get(f"/v1/files/{quoted}")).json()["id"] == stored["id"]
    inside = (await client.get(f"/v1/vector_stores/notes/files/{stored['id']}")).json()
    assert (inside["object"], inside["status"]) == ("vector_store.file", "completed")
    assert inside["attributes"] == {"land": "fj"}

    gone = await client.delete("/v1/files/notes/fiji.txt")
    assert gone.json() == {"id": "notes/fiji.txt", "object": "file", "deleted": True}
    for path in ("files/notes/fiji.txt", "vector_stores/notes/files/notes/fiji.txt", "files/nothing", "files/a/b"):
        assert (await client.get(f"/v1/{path}")).status_code == 404
        assert (await client.delete(f"/v1/{path}")).status_code == 404


async def test_fields_of_a_form_one_by_one(client: httpx.AsyncClient) -> None:
    data = {
        "blockrag[collection]": "notes",
        "blockrag[document_id]": "islands/fiji",
        "blockrag[media_type]": "text/plain",
    }
    stored = await client.post("/v1/files", files={"file": ("x", TEXT)}, data=data)
    assert stored.json()["id"] == "notes/islands/fiji"
    assert (await client.get("/v1/files/notes/islands/fiji")).status_code == 200


async def test_a_vector_store_takes_files_and_lists_them(client: httpx.AsyncClient) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        response = await client.post("/v1/vector_stores/notes/files", files={"file": (name, TEXT + name.encode())})
        assert response.json()["vector_store_id"] == "notes"
    await upload(client, "d.txt", "other")

    first = (await client.get("/v1/vector_stores/notes/files", params={"limit": 2})).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["notes/a.txt", "notes/b.txt"], True)
    rest = (await client.get("/v1/vector_stores/notes/files", params={"after": first["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (["notes/c.txt"], False)

    everything: list[str] = []
    after = ""
    while True:
        page = (await client.get("/v1/files", params={"limit": 1, "after": after})).json()
        everything += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert everything == ["notes/a.txt", "notes/b.txt", "notes/c.txt", "other/d.txt"]

    gone = await client.delete("/v1/vector_stores/notes/files/notes/a.txt")
    assert gone.json()["object"] == "vector_store.file.deleted"
    assert (await client.get("/v1/files/notes/a.txt")).status_code == 404


async def test_attaching_says_what_is_there(client: httpx.AsyncClient) -> None:
    stored = await upload(client, "a.txt", "notes")
    body = {"file_id": stored["id"]}
    assert (await client.post("/v1/vector_stores/notes/files", json=body)).json()["status"] == "completed"
    elsewhere = await client.post("/v1/vector_stores/other/files", json=body)
    assert (elsewhere.status_code, elsewhere.json()["error"]["param"]) == (400, "file_id")
    bad = await client.post("/v1/vector_stores/notes/files", json={"file": "x"})
    assert bad.status_code == 400


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({}, {"purpose": "assistants"}, "file"),
        ({"file": ("a.txt", TEXT)}, {"expires_after": "x"}, "expires_after"),
        ({"file": ("a.txt", TEXT)}, {"blockrag": "{"}, "blockrag"),
        ({"file": ("a.txt", TEXT)}, {"blockrag": "[1]"}, "blockrag"),
        ({"file": ("a.txt", TEXT)}, {"blockrag[colection]": "x"}, "blockrag.colection"),
        ({"file": ("a.txt", TEXT)}, {"blockrag[metadata]": "7"}, "blockrag.metadata"),
        ({"file": ("a.txt", TEXT)}, {"blockrag[metadata][year]": "7"}, "blockrag.metadata"),
        ({"file": ("a.txt", TEXT)}, {"blockrag": json.dumps({"metadata": {"x": 2**53}})}, "blockrag.metadata"),
        ({"file": ("a.txt", TEXT)}, {"blockrag[language]": "klingon"}, "blockrag.language"),
        ({"file": ("a.txt", TEXT)}, {"blockrag[document_id]": "a\tb"}, "blockrag.document_id"),
        ({"file": ("a" * 513 + ".txt", TEXT)}, {}, "file"),
        ({"file": ("a.txt", TEXT)}, {"blockrag": '{"title": "\\ud800"}'}, "blockrag"),
        ({"file": ("a.txt", TEXT)}, {"blockrag": '{"collection": "../x"}'}, "blockrag.collection"),
        ({"file": ("a.txt", b"")}, {}, "file"),
        ({"file": ("a.bin", b"\x00\x01")}, {}, None),
    ],
)
async def test_an_upload_that_cannot_be(
    client: httpx.AsyncClient, gateway: StandIn, files: Any, data: Any, param: str | None
) -> None:
    response = await client.post("/v1/files", files=files, data=data)
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param
    assert gateway.index.documents == {}


async def test_what_is_too_large_is_refused_while_it_comes() -> None:
    settings = Settings(gateway=GatewaySettings(max_document_mb=1))
    async with served(StandIn(), settings) as client:
        large = await client.post("/v1/files", files={"file": ("a.txt", b"a" * 2**21)})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")

        async def unannounced() -> Any:
            yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
            for _ in range(40):
                yield b"a" * 65_536

        headers = {"content-type": "multipart/form-data; boundary=x"}
        large = await client.post("/v1/files", content=unannounced(), headers=headers)
        assert large.status_code == 413
        big = {"model": "blockrag", "input": "x" * (5 * 2**20)}
        assert (await client.post("/v1/responses", json=big)).status_code == 413


async def test_a_search(client: httpx.AsyncClient, gateway: StandIn) -> None:
    body = {"query": "Where?", "max_num_results": 2, "filters": {"type": "eq", "key": "year", "value": 1999}}
    page = (await client.post("/v1/vector_stores/notes/search", json=body)).json()

    assert (page["object"], page["search_query"]) == ("vector_store.search_results.page", ["Where?"])
    assert [found["file_id"] for found in page["data"]] == ["notes/d0.md", "notes/d0.md"]
    assert page["data"][0]["content"] == [{"type": "text", "text": "a b c"}]
    attributes = page["data"][0]["attributes"]
    assert attributes == {"year": 1999}
    assert isinstance(attributes["year"], int), "row C11, over HTTP"
    (searched,) = gateway.searcher.requests
    assert (searched.collection, searched.top_k, searched.filter[0].key) == ("notes", 2, "year")
    for wrong in (
        {"rewrite_query": True},
        {"max_num_results": 0},
        {"max_num_results": 101},
        {"query": ["a", "b"]},
        {"query": ""},
        {"query": None},
        {"filters": {"type": "in", "key": "year", "value": []}},
    ):
        refused = await client.post("/v1/vector_stores/notes/search", json={**body, **wrong})
        (field,) = wrong
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith(field)
    refused = await client.post("/v1/vector_stores/-/search", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "collection")


async def test_models_are_the_tenant_s_collections(client: httpx.AsyncClient) -> None:
    await upload(client, "a.txt", "notes")
    models = (await client.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["blockrag", "blockrag/notes"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("vector_stores/notes/search", '{"query": "a \\ud800"}'),
        ("vector_stores/notes/search", '{"query": "a", "filters": {"type": "eq", "key": "k", "value": "\\ud800"}}'),
        ("vector_stores/notes/search", '{"query": "a", "\\ud800": 1}'),
        ("chat/completions", '{"model": "blockrag", "messages": [{"role": "user", "content": "\\ud800"}]}'),
        ("responses", '{"model": "blockrag", "input": "a", "instructions": "\\udfff"}'),
    ],
)
async def test_what_json_can_write_and_no_text_can_be_is_refused(
    client: httpx.AsyncClient, path: str, body: str
) -> None:
    """Rows B4 and B5, over HTTP."""
    response = await client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400, response.text
    assert "half of a surrogate pair" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            "vector_stores/notes/search",
            '{"query": "a", "filters": {"type": "eq", "key": "k", "value": 1e999}}',
            "filters",
        ),
        (
            "vector_stores/notes/search",
            '{"query": "a", "filters": {"type": "eq", "key": "k", "value": 1%s}}' % ("0" * 400),
            "filters",
        ),
        ("responses", '{"model": "blockrag", "input": "a", "metadata": {"k": NaN}}', "metadata"),
        ("chat/completions", '{"model": "blockrag", "messages": [], "user": -Infinity}', "user"),
    ],
)
async def test_numbers_that_no_answer_can_say_are_refused(
    client: httpx.AsyncClient, path: str, body: str, field: str
) -> None:
    response = await client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert field in response.json()["error"]["message"]


async def test_metadata_with_a_number_beyond_all_is_refused(client: httpx.AsyncClient) -> None:
    options = '{"metadata": {"year": 1%s}}' % ("0" * 400)
    response = await client.post(
        "/v1/files", files={"file": ("a.txt", b"Fiji is a country.")}, data={"blockrag": options}
    )
    assert response.status_code == 400, response.text


async def test_a_collection_that_goes_while_files_are_listed_is_left_out(
    client: httpx.AsyncClient, gateway: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for collection in ("a", "b", "c"):
        await upload(client, "a.txt", collection)
    list_documents = gateway.list_documents

    async def gone(request: Any, call: Any) -> Any:
        if request.collection == "b":
            raise NotFoundError("collection 'b' does not exist")
        return await list_documents(request, call)

    monkeypatch.setattr(gateway, "list_documents", gone)
    listed = (await client.get("/v1/files")).json()
    assert [file["id"] for file in listed["data"]] == ["a/a.txt", "c/a.txt"]


async def test_where_an_upload_comes_from_and_its_language(client: httpx.AsyncClient, gateway: StandIn) -> None:
    """Rows C1 and C13, over HTTP."""
    await upload(client, "a.txt", "notes", source="manuals/a", language="russian")

    assert gateway.index.documents[("notes", "a.txt")].source == "manuals/a"
    assert gateway.index.languages == {"notes": "russian"}


async def test_documents_that_hold_an_equal_passage_are_named(client: httpx.AsyncClient, gateway: StandIn) -> None:
    """Section D, over HTTP: six equal passages are one result, cited as six documents."""
    first, *others = (Passage.FromString(passage.SerializeToString()) for passage in gateway.searcher.passages)
    first.also_in.add(document_id="twin.md", passage_id="t")
    gateway.searcher.passages = [first, *others]
    found = (await client.post("/v1/vector_stores/notes/search", json={"query": "Where?"})).json()["data"]
    body = {"model": "blockrag/notes", "input": "Where?"}
    answer = (await client.post("/v1/responses", json=body)).json()
    assert found[0]["blockrag"]["also_in"] == ["notes/twin.md"]
    cited = [one["filename"] for one in answer["output"][-1]["content"][0]["annotations"]]
    assert cited[:2] == ["d0.md", "twin.md"]


@pytest.mark.parametrize("depth", [50, 400, 900, 20_000])
async def test_json_of_any_depth_is_refused(client: httpx.AsyncClient, depth: int) -> None:
    body = b'{"query": "x", "messages": ' + b"[" * depth + b"]" * depth + b"}"
    response = await client.post(
        "/v1/vector_stores/notes/search", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
