"""Chat completions over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from blockrag.errors import DeadlineError, OverloadedError, PromptTooLongError, UnavailableError
from blockrag.http.shared_fields import Said, put_conversation
from blockrag.v1 import common_pb2, rag_pb2

from .standin import StandIn

ASK = {"model": "blockrag/notes", "messages": [{"role": "user", "content": "Where is Oslo?"}]}


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={**ASK, **fields})


async def refused(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await post(client, **fields)
    assert response.status_code == 400, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_an_answer(client: httpx.AsyncClient, gateway: StandIn) -> None:
    response = await post(client, seed=3, max_tokens=7, stop="x", temperature=0.5, top_p=0.9)

    body = response.json()
    assert response.status_code == 200, body
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Oslo.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 50,
        "completion_tokens": 2,
        "total_tokens": 52,
        "prompt_tokens_details": {"cached_tokens": 40},
    }
    assert body["system_fingerprint"] == "f00d"
    assert [cited["document_id"] for cited in body["blockrag"]["citations"]][:2] == ["d0.md", "d0.md"]
    assert body["blockrag"]["seed"] == 3
    (decoded,) = gateway.decoder.requests
    assert decoded.sampling == common_pb2.Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=["x"])
    (searched,) = gateway.searcher.requests
    assert (searched.collection, searched.query, searched.top_k) == ("notes", "Where is Oslo?", 5)


async def test_a_stream(client: httpx.AsyncClient) -> None:
    response = await post(client, stream=True)

    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "Oslo"}, {"content": "."}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["blockrag"]["usage"]["cached_tokens"] == 40


async def test_a_stream_with_usage(client: httpx.AsyncClient) -> None:
    response = await post(client, stream=True, stream_options={"include_usage": True})

    *chunks, last, _ = events(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 40}


async def test_text_comes_before_the_answer_ends(client: httpx.AsyncClient, gateway: StandIn) -> None:
    go_on = asyncio.Event()
    words = iter(range(10))

    async def wait_after_the_first() -> None:
        if next(words):
            await go_on.wait()

    gateway.decoder.delay = wait_after_the_first
    async with client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        pieces = response.aiter_text()
        first = await anext(pieces)
        assert "Oslo" in first
        go_on.set()
        assert "[DONE]" in "".join([piece async for piece in pieces])


async def test_a_client_that_leaves_stops_the_decoder(client: httpx.AsyncClient, gateway: StandIn) -> None:
    words = iter(range(10))

    async def wait_after_the_first() -> None:
        if next(words):
            await asyncio.Event().wait()

    gateway.decoder.delay = wait_after_the_first
    async with client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        await anext(response.aiter_text())
    until = time.monotonic() + 5
    while not gateway.decoder.closed and time.monotonic() < until:  # noqa: ASYNC110  (the fake has no event)
        await asyncio.sleep(0.005)
    assert gateway.decoder.closed


async def test_the_conversation_stands_before_the_question(client: httpx.AsyncClient, gateway: StandIn) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "Peru?"}]},
        {"role": "assistant", "content": "In America."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "And Oslo?"},
        {"role": "user", "content": "The city."},
    ]

    assert (await post(client, messages=messages)).status_code == 200

    (planned,) = gateway.planner.requests
    assert planned.instructions == "Be brief.\n\nBe kind."
    assert list(planned.turns) == [common_pb2.Turn(question="Where is Peru?", answer="In America.")]
    assert planned.question == "And Oslo?\n\nThe city."
    (searched,) = gateway.searcher.requests
    assert searched.query == planned.question, "what was said before is not searched for"


def test_many_messages_of_one_side_are_put_together_in_linear_time() -> None:
    """As many as a body holds; the gateway refuses what is too long, and nobody else waits for that."""
    said, request = [Said("user", "a" * 28)] * 75_000, rag_pb2.GenerateRequest()
    began = time.process_time()
    put_conversation(said, request, "messages")
    assert time.process_time() - began < 1
    assert len(request.question) == 75_000 * 30 - 2


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "assistant"], ["system"], ["assistant", "user"]], ids=" ".join
)
async def test_a_conversation_that_asks_nothing(client: httpx.AsyncClient, roles: list[str]) -> None:
    error = await refused(client, messages=[{"role": role, "content": "x"} for role in roles])
    assert error["param"] == "messages"


async def test_retrieval_follows_the_collection_that_is_named(client: httpx.AsyncClient, gateway: StandIn) -> None:
    tool = {"type": "file_search", "vector_store_ids": ["other"], "max_num_results": 2}
    assert (await post(client, model="blockrag", tools=[tool])).status_code == 200
    assert (gateway.searcher.requests[-1].collection, gateway.searcher.requests[-1].top_k) == ("other", 2)

    assert (await post(client, model="blockrag")).status_code == 200
    assert len(gateway.searcher.requests) == 1
    assert gateway.decoder.requests[-1].attention_mode == common_pb2.ATTENTION_MODE_NONE

    for fields in (
        {"tools": [tool]},
        {"tools": [tool, tool]},
        {"model": "blockrag", "blockrag": {"attention_mode": "full"}},
    ):
        await refused(client, **fields)
    for model in ("gpt-4o", "blockrag/", "blockrag/nowhere", ""):
        missing = await post(client, model=model)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


async def test_what_openai_has_no_field_for(client: httpx.AsyncClient, gateway: StandIn) -> None:
    options = {
        "attention_mode": "block",
        "top_k": 3,
        "rate": 2,
        "policy": "retrieval",
        "max_context_tokens": 100,
        "filter": {
            "type": "and",
            "filters": [
                {"type": "eq", "key": "land", "value": "no"},
                {"type": "gte", "key": "year", "value": 1999},
                {"type": "nin", "key": "draft", "value": [True]},
            ],
        },
    }

    assert (await post(client, blockrag=options)).status_code == 200

    (searched,) = gateway.searcher.requests
    operators = common_pb2.ConditionOperator
    assert [(one.key, one.operator) for one in searched.filter] == [
        ("land", operators.CONDITION_OPERATOR_IN),
        ("year", operators.CONDITION_OPERATOR_AT_LEAST),
        ("draft", operators.CONDITION_OPERATOR_NOT_IN),
    ]
    assert searched.filter[2].values[0].bool_value is True
    (planned,) = gateway.planner.requests
    assert planned.compression == common_pb2.Compression(rate=2, policy="retrieval")
    assert (len(planned.passages), planned.max_context_tokens) == (3, 100)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"functions": []}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"blockrag": {"rat": 2}}, "blockrag.rat"),
        ({"blockrag": {"rate": 99}}, "blockrag.rate"),
        ({"blockrag": {"rate": 2, "max_ttft_ms": 5}}, "blockrag"),
        ({"blockrag": {"rate": "most"}}, "blockrag.rate.float"),
        ({"blockrag": {"top_k": -1}}, "blockrag.top_k"),
        ({"blockrag": {"filter": {"type": "or", "filters": []}}}, "blockrag.filter.Comparison.type"),
        ({"blockrag": {"filter": {"type": "eq", "key": "k", "value": ["a"]}}}, "blockrag.filter"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 99}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_would_change_the_answer_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    error = await refused(client, **fields)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param, error


async def test_what_changes_nothing_is_accepted(client: httpx.AsyncClient) -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "u1",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": None,
        "stop": None,
        "stream": None,
    }
    assert (await post(client, **neutral)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("64 answers are in progress", 1300), 429, "rate_limit_exceeded"),
        (DeadlineError("too late"), 504, "timeout"),
        (UnavailableError("retriever: gone"), 503, "unavailable"),
        (PromptTooLongError("too long"), 400, "context_length_exceeded"),
    ],
)
async def test_each_error_has_its_status(
    client: httpx.AsyncClient, gateway: StandIn, error: Any, status: int, code: str
) -> None:
    gateway.error = error
    for stream in (False, True):
        response = await post(client, stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        if status == 429:
            assert response.headers["retry-after"] == "2"
            assert response.headers["retry-after-ms"] == "1300"


async def test_a_decoder_that_refuses_still_gives_a_status(client: httpx.AsyncClient, gateway: StandIn) -> None:
    gateway.decoder.failures = [(0, OverloadedError("64 sequences wait", 250))]
    assert (await post(client, stream=True)).status_code == 429


async def test_an_error_after_the_first_text_is_told_in_the_stream(client: httpx.AsyncClient, gateway: StandIn) -> None:
    gateway.decoder.failures = [(1, UnavailableError("gone"))]
    first, second = events((await post(client, stream=True)).text)
    assert first["choices"][0]["delta"]["content"] == "Oslo"
    assert second["error"]["code"] == "unavailable"


async def test_an_unforeseen_error_says_nothing_of_itself(
    client: httpx.AsyncClient, gateway: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.decoder.failures = [(1, ZeroDivisionError("secret"))]
    last = events((await post(client, stream=True)).text)[-1]
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(last)
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (b"{", "application/json", "the body is no JSON at character 1: Expecting property name"),
        (json.dumps(ASK).encode(), "application/x-www-form-urlencoded", "Content-Type: application/json"),
    ],
)
async def test_bytes_that_are_no_json(client: httpx.AsyncClient, content: bytes, kind: str, told: str) -> None:
    response = await client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert told in error["message"]


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [("eq", ["a"], "eq takes one value"), ("lte", [], "lte takes one value"), ("in", "a", "in takes a list")],
)
async def test_what_a_comparison_takes(client: httpx.AsyncClient, kind: str, value: Any, told: str) -> None:
    error = await refused(client, blockrag={"filter": {"type": kind, "key": "k", "value": value}})
    assert error["message"] == f"blockrag.filter: {told}"


@pytest.mark.parametrize("own", [False, True])
async def test_what_is_refused_is_named_where_it_was_said(client: httpx.AsyncClient, own: bool) -> None:
    tool = {"type": "file_search", "vector_store_ids": ["notes"], "max_num_results": 101}
    tool["filters"] = {"type": "in", "key": "k", "value": []}
    options = {"top_k": 101, "filter": tool["filters"]} if own else {}
    error = await refused(client, tools=[tool], blockrag=options)
    assert error["param"] == ("blockrag.top_k" if own else "tools.0.max_num_results")
    error = await refused(client, tools=[{**tool, "max_num_results": 1}], blockrag={**options, "top_k": 1})
    assert error["param"] == ("blockrag.filter" if own else "tools.0.filters")
