"""What the door says beyond OpenAI's API: what was read, the system, traces, warming."""

from __future__ import annotations

import json
from typing import Any

import httpx

from blockrag.errors import NotFoundError, OverloadedError

from .standin import StandIn

TRACE = "a" * 32
ASK = {"model": "blockrag/notes", "input": "Where?"}


async def details(client: httpx.AsyncClient, **options: Any) -> dict[str, Any]:
    response = await client.post("/v1/responses", json={**ASK, "blockrag": options})
    assert response.status_code == 200, response.text
    return dict(response.json()["blockrag"])


async def test_each_block_says_where_it_was_found(client: httpx.AsyncClient) -> None:
    told = await details(client, top_k=2)
    assert told["instruction_slots"] == {"l1": 1, "store": 0, "disk": 0, "encoded": 0}
    assert [citation["slots"]["l1"] for citation in told["citations"]] == [3, 3]
    assert told["turn_slots"] == []
    assert "chunks" not in told["citations"][0]


async def test_chunks_are_told_when_asked_for(client: httpx.AsyncClient, gateway: StandIn) -> None:
    gateway.planner.fits = 1
    read, dropped = (await details(client, top_k=2, explain=True))["citations"]
    assert read["chunks"] == [{"start_token": 0, "end_token": 3, "form": "expanded", "text": ""}]
    assert [chunk["form"] for chunk in dropped["chunks"]] == ["dropped"]
    assert dropped["dropped_reason"] == "over the token budget"
    body = {"model": "blockrag/notes", "messages": [{"role": "user", "content": "?"}], "blockrag": {"explain": True}}
    chat = (await client.post("/v1/chat/completions", json=body)).json()
    assert chat["blockrag"]["citations"][0]["chunks"]


async def test_the_system_says_what_can_be_asked_and_what_is_ill(client: httpx.AsyncClient) -> None:
    found = (await client.get("/v1/blockrag/system")).json()
    assert found["bundle"] == {"name": "reader", "fingerprint": "f00d", "chunk_tokens": 4, "compresses_chunks": True}
    assert found["limits"]["max_top_k"] >= 5
    health = {service["name"]: service for service in found["services"]}
    assert health["retriever"]["healthy"]
    assert (health["decoder"]["healthy"], health["decoder"]["detail"]) == (False, "gone")


async def test_a_trace_counts_from_its_first_span(client: httpx.AsyncClient, gateway: StandIn) -> None:
    trace = (await client.get(f"/v1/blockrag/traces/{TRACE}")).json()
    assert trace["id"] == TRACE
    first, second = trace["spans"]
    assert (first["start_ms"], first["milliseconds"], first["parent_span_id"]) == (0.0, 9.0, "")
    assert (second["start_ms"], second["milliseconds"], second["parent_span_id"]) == (1.5, 2.5, "a")
    assert second["error"] == "late"
    gateway.error = NotFoundError("no spans")
    assert (await client.get(f"/v1/blockrag/traces/{TRACE}")).json()["spans"] == []
    gateway.error = None
    assert (await client.get("/v1/blockrag/traces/short")).status_code == 400


async def test_warming_says_how_far_it_is(client: httpx.AsyncClient, gateway: StandIn) -> None:
    done = (await client.post("/v1/blockrag/warm", json={"collection": "notes"})).json()
    assert (done["object"], done["done"], done["total"], done["hits"]) == ("blockrag.warming", 3, 3, 1)
    streamed = await client.post("/v1/blockrag/warm", json={"collection": "notes", "stream": True})
    *steps, end = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert [json.loads(step)["done"] for step in steps] == [0, 1, 2, 3]
    assert end == "[DONE]"
    gateway.error = OverloadedError("warmings are under way", 250)
    refused = await client.post("/v1/blockrag/warm", json={"collection": "notes", "stream": True})
    assert refused.status_code == 429


async def test_files_that_are_warmed_belong_to_the_collection(client: httpx.AsyncClient, gateway: StandIn) -> None:
    body = {"collection": "notes", "file_ids": ["notes/a.txt"]}
    assert (await client.post("/v1/blockrag/warm", json=body)).status_code == 200
    assert (await client.post("/v1/blockrag/warm", json={**body, "file_ids": ["other/a.txt"]})).status_code == 404


async def test_listings_say_what_a_person_wants_to_know(client: httpx.AsyncClient) -> None:
    file = {"file": ("a.txt", b"Zinc melts at 420 degrees.")}
    stored = (await client.post("/v1/vector_stores/notes/files", files=file)).json()
    assert (stored["blockrag"]["outcome"], stored["blockrag"]["passages"]) == ("created", 1)
    again = (await client.post("/v1/vector_stores/notes/files", files=file)).json()
    assert again["blockrag"]["outcome"] == "unchanged"
    (listed,) = (await client.get("/v1/vector_stores/notes/files")).json()["data"]
    assert (listed["blockrag"]["title"], listed["blockrag"]["passages"]) == ("a", 1)
    (_, notes) = (await client.get("/v1/models")).json()["data"]
    assert (notes["blockrag"]["collection"], notes["blockrag"]["documents"]) == ("notes", 1)
