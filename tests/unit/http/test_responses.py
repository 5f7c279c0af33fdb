"""Responses over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from blockrag.errors import UnavailableError
from blockrag.v1 import common_pb2
from blockrag.v1.common_pb2 import FINISH_REASON_LENGTH, Passage

from .standin import StandIn

ASK = {"model": "blockrag/notes", "input": "Where is Oslo?"}


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/responses", json={**ASK, **fields})


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for block in filter(None, text.split("\n\n")):
        name, payload = block.split("\n")
        found.append(json.loads(payload.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def test_a_response_cites_the_documents_that_were_read(client: httpx.AsyncClient, gateway: StandIn) -> None:
    gateway.planner.fits = 3
    response = (await post(client, include=["file_search_call.results"], max_output_tokens=9)).json()

    assert (response["object"], response["status"]) == ("response", "completed")
    search, message = response["output"]
    assert (search["type"], search["queries"]) == ("file_search_call", ["Where is Oslo?"])
    assert [found["file_id"] for found in search["results"]][:3] == ["notes/d0.md", "notes/d0.md", "notes/d1.md"]
    assert search["results"][0]["attributes"] == {"year": 1999}
    (part,) = message["content"]
    assert part["text"] == "Oslo."
    assert part["annotations"] == [
        {"type": "file_citation", "index": 5, "file_id": f"notes/{name}", "filename": name}
        for name in ("d0.md", "d1.md")
    ]
    assert response["usage"] == {
        "input_tokens": 50,
        "input_tokens_details": {"cached_tokens": 40},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 52,
    }
    assert gateway.decoder.requests[0].sampling.max_tokens == 9


async def test_without_a_collection_nothing_is_searched(client: httpx.AsyncClient, gateway: StandIn) -> None:
    response = (await post(client, model="blockrag")).json()
    assert [item["type"] for item in response["output"]] == ["message"]
    assert gateway.searcher.requests == []


async def test_a_stream_of_events(client: httpx.AsyncClient) -> None:
    found = events((await post(client, stream=True)).text)

    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "file_search_call.in_progress",
        "file_search_call.searching",
        "file_search_call.completed",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        *["output_text.annotation.added"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    whole = (await post(client)).json()
    last = found[-1]["response"]
    assert [item["type"] for item in last["output"]] == [item["type"] for item in whole["output"]]
    assert last["output"][1]["content"] == whole["output"][1]["content"]
    assert "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta") == "Oslo."


async def test_an_event_is_one_line_for_every_client(client: httpx.AsyncClient, gateway: StandIn) -> None:
    found_first = Passage.FromString(gateway.searcher.passages[0].SerializeToString())
    found_first.metadata.update({"said": "a\x85b"})
    gateway.searcher.passages = [found_first]
    asked = {**ASK, "stream": True, "instructions": "a\u2028b\u2029c", "include": ["file_search_call.results"]}
    async with client.stream("POST", "/v1/responses", json=asked) as response:
        lines = [line async for line in response.aiter_lines()]
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert found[-1]["response"]["instructions"] == "a\u2028b\u2029c"
    assert found[-1]["response"]["output"][0]["results"][0]["attributes"]["said"] == "a\x85b"


async def test_an_answer_that_was_cut_is_incomplete(client: httpx.AsyncClient, gateway: StandIn) -> None:
    gateway.decoder.reason = FINISH_REASON_LENGTH

    whole = (await post(client)).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert events((await post(client, stream=True)).text)[-1]["type"] == "response.incomplete"


async def test_a_conversation(client: httpx.AsyncClient, gateway: StandIn) -> None:
    first = (await post(client)).json()
    conversation = [
        {"role": "user", "content": "Where is Oslo?"},
        *first["output"],
        {"role": "user", "content": [{"type": "input_text", "text": "Since when?"}]},
    ]

    assert (await post(client, input=conversation, instructions="Be brief.")).status_code == 200

    planned = gateway.planner.requests[-1]
    assert planned.instructions == "Be brief."
    assert list(planned.turns) == [common_pb2.Turn(question="Where is Oslo?", answer="Oslo.")]
    assert planned.question == gateway.searcher.requests[-1].query == "Since when?"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.type"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"include": ["message.output_text.logprobs"]}, "include.0"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": ""}, "input"),
        ({"input": "x" * 9000}, "input"),
        ({"instructions": "\0"}, "instructions"),
        ({"input": [{"role": "system", "content": "\0"}, {"role": "user", "content": "x"}]}, "input"),
        ({"model": "blockrag/-"}, "model"),
        (
            {"model": "blockrag", "tools": [{"type": "file_search", "vector_store_ids": ["-"]}]},
            "tools.0.vector_store_ids",
        ),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input"),
        ({"n": 1}, "n"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_would_change_the_answer_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await post(client, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_an_error_after_the_first_text_is_an_event(client: httpx.AsyncClient, gateway: StandIn) -> None:
    gateway.decoder.failures = [(1, UnavailableError("gone"))]
    last = events((await post(client, stream=True)).text)[-1]
    assert (last["type"], last["code"]) == ("error", "unavailable")
