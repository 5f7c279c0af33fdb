"""Who comes in over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio.to_thread
import httpx
import pytest

from blockrag.access import THE_SYSTEM
from blockrag.http.app import build_app
from blockrag.http.door import MAX_JSON_BYTES
from blockrag.settings import ClusterSettings, GatewaySettings, KvCacheSettings, Settings
from blockrag.tenants import TenantSettings

from .standin import StandIn, served

KEY = "acme-key-0123456789"
GUARDED = Settings(
    gateway=GatewaySettings(tenants=(TenantSettings(name="acme", api_key=KEY),)),
    kv_cache=KvCacheSettings(secret="a secret of this test"),
)


@pytest.fixture
async def guarded(gateway: StandIn) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a door that asks for keys."""
    async with served(gateway, GUARDED) as client:
        yield client


async def test_a_key_is_asked_for_and_names_the_tenant(guarded: httpx.AsyncClient, gateway: StandIn) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
        refused = await guarded.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"
    assert gateway.calls == []

    sent = {"authorization": f"Bearer {KEY}", "x-request-id": "r7", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    assert (await guarded.get("/v1/models", headers=sent)).status_code == 200
    (call,) = gateway.calls
    assert (call.caller.tenant, call.caller.operator) == ("acme", False)
    assert dict(call.metadata) == {"request_id": "r7", "traceparent": sent["traceparent"]}


async def test_nothing_is_read_before_the_key(guarded: httpx.AsyncClient) -> None:
    for path in ("chat/completions", "responses", "files", "vector_stores/a/search", "nothing"):
        assert (await guarded.post(f"/v1/{path}", content=b"{")).status_code == 401


async def test_a_key_goes_on_with_an_upload(guarded: httpx.AsyncClient, gateway: StandIn) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    stored = await guarded.post("/v1/files", files={"file": ("a.txt", b"Fiji is a country.")}, headers=headers)
    assert stored.status_code == 200
    assert gateway.authorizations == [f"Bearer {KEY}"]


async def test_without_keys_the_machine_s_own_are_the_system(client: httpx.AsyncClient, gateway: StandIn) -> None:
    assert (await client.get("/v1/models")).status_code == 200
    assert gateway.calls[0].caller == THE_SYSTEM


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 401),
        ({"origin": "null"}, 401),
        ({"host": "rebound.example"}, 401),
        ({"host": "rebound.example", "origin": "http://rebound.example"}, 401),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": ""}, 401),
        ({"host": "[::1"}, 401),
        ({"origin": "http://[x"}, 401),
    ],
)
async def test_no_other_site_s_page_comes_in_without_keys(
    client: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    assert (await client.get("/v1/models", headers=headers)).status_code == status


async def test_another_site_may_come_with_a_key(guarded: httpx.AsyncClient) -> None:
    headers = {"authorization": f"Bearer {KEY}", "host": "rag.example", "origin": "https://app.example"}
    assert (await guarded.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"])
async def test_another_machine_does_not(host: str) -> None:
    transport = httpx.ASGITransport(build_app(StandIn(), Settings()), client=(host, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        assert (await client.get("/v1/models")).status_code == 401


async def test_a_system_for_other_machines_has_keys_alone() -> None:
    settings = GUARDED.model_copy(update={"cluster": ClusterSettings(host="0.0.0.0")})
    transport = httpx.ASGITransport(build_app(StandIn(), settings), client=("192.0.2.7", 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://rag.example") as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})).status_code == 200


async def test_the_schema_is_open_and_the_rest_is_not_found(guarded: httpx.AsyncClient) -> None:
    schema = (await guarded.get("/openapi.json")).json()
    assert len(schema["paths"]) == 11
    options = schema["components"]["schemas"]["BlockragOptions"]["properties"]
    assert all(option.get("description") for option in options.values()), options
    for path in ("/index.html", "/page/", "/page/..%2fapp.py", "/page/app.py"):
        missing = await guarded.get(path)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


async def test_no_question_waits_for_a_thread(client: httpx.AsyncClient) -> None:
    """FastAPI runs what is not async in threads, which take milliseconds to come back on busy cores."""
    threads = anyio.to_thread.current_default_thread_limiter()
    everybody = object()
    many, threads.total_tokens = threads.total_tokens, 1
    await threads.acquire_on_behalf_of(everybody)
    try:
        body = {"model": "blockrag/notes", "messages": [{"role": "user", "content": "Where?"}], "stream": True}
        assert (await client.post("/v1/chat/completions", json=body, timeout=5)).status_code == 200
        assert (await client.get("/v1/models", timeout=5)).status_code == 200
        assert (await client.get("/", timeout=5)).status_code == 200
    finally:
        threads.release_on_behalf_of(everybody)
        threads.total_tokens = many


async def test_a_form_is_one_however_its_type_is_written(client: httpx.AsyncClient) -> None:
    content = b"--b\r\nContent-Disposition: form-data; name=file; filename=a.txt\r\n\r\n"
    content += b"A word. " * (MAX_JSON_BYTES // 8) + b"\r\n--b--\r\n"
    headers = {"content-type": "Multipart/Form-Data; boundary=b"}
    for path in ("files", "vector_stores/notes/files"):
        response = await client.post(f"/v1/{path}", content=content, headers=headers)
        assert response.status_code == 200, response.text


async def test_a_body_is_bounded(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/responses", content=b" " * (MAX_JSON_BYTES + 1))
    assert response.status_code == 413
