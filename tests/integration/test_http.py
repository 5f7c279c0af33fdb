"""HTTP in the running system: clients that are not ours, a client that leaves, keys, memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from blockrag.client import BlockragClient
from blockrag.settings import GatewaySettings
from blockrag.tenants import TenantSettings
from tests.integration.conftest import Cluster
from tests.integration.replicas import replica_pids

_CLIENTS = Path(__file__).parent / "clients"
_BIN = Path(__file__).parents[2] / ".venv-clients" / "bin"
_KEY = "acme-key-0123456789"
_MIB = 2**20


@pytest.fixture
def base_url(cluster: Cluster) -> str:
    """Of the running system."""
    return cluster.system.http_url


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client of it."""
    async with httpx.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
async def collection(client: BlockragClient) -> AsyncIterator[str]:
    """A collection with two articles, removed at the end."""
    name = "http-articles"
    await client.ingest_text("norway.txt", "The capital of Norway is Oslo, says this one.", collection=name)
    await client.ingest_text("peru.txt", "The capital of Peru is Lima, says this one.", collection=name)
    yield name
    await client.delete_collection(name)


def run(program: str, *arguments: str, seconds: float = 120) -> str:
    """Output of a program of ``.venv-clients``."""
    if not (_BIN / program).exists():
        pytest.skip("make clients installs them")
    environment = {"PATH": "/usr/bin:/bin", "NO_PROXY": "*", "HOME": str(_BIN.parent)}
    result = subprocess.run(
        [str(_BIN / program), *arguments], capture_output=True, text=True, timeout=seconds, env=environment
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_openai_s_own_package(base_url: str) -> None:
    assert "openai" in run("python", str(_CLIENTS / "openai_client.py"), base_url, "http-openai")


def test_langchain_and_llamaindex(base_url: str, collection: str) -> None:
    assert "frameworks" in run("python", str(_CLIENTS / "frameworks.py"), base_url, collection)


def test_what_the_schema_allows_never_breaks_the_server(base_url: str) -> None:
    schema = base_url.removesuffix("/v1") + "/openapi.json"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--seed", "1", "--checks", checks]
    assert run("schemathesis", "run", schema, *options, "--request-timeout", "30", seconds=240)


def test_curl_shows_a_stream(base_url: str, collection: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    question = [{"role": "user", "content": "Where?"}]
    body = json.dumps({"model": f"blockrag/{collection}", "stream": True, "max_tokens": 3, "messages": question})
    url = f"{base_url}/chat/completions"
    command = [curl, "-sN", "--noproxy", "*", url, "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    assert lines[0].startswith('data: {"id":"chatcmpl-')
    assert lines[-2] == "data: [DONE]"


async def test_http_says_what_grpc_says(http: httpx.AsyncClient, client: BlockragClient, collection: str) -> None:
    question = "What is the capital of Norway?"
    answer = await client.ask(question, collection=collection, max_tokens=6)
    body = {"model": f"blockrag/{collection}", "messages": [{"role": "user", "content": question}], "max_tokens": 6}
    sent = await http.post("/chat/completions", json=body)
    assert sent.json()["choices"][0]["message"]["content"] == answer.text
    trace_id = sent.json()["blockrag"]["trace_id"]
    assert {"gateway", "retriever", "decoder"} <= {span.service for span in await client.trace(trace_id)}


async def test_a_client_that_leaves_its_stream_stops_the_decoder(
    http: httpx.AsyncClient, client: BlockragClient, collection: str
) -> None:
    body = {**await endless_question(http, collection), "max_tokens": 12_000, "stream": True}
    # Answers that other tests' clients left without streaming may run to their ends.
    await until_running(client, 0, seconds=90)
    async with http.stream("POST", "/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert '"error"' not in await anext(response.aiter_lines())
    await until_running(client, 0, seconds=8)


async def endless_question(http: httpx.AsyncClient, collection: str) -> dict[str, object]:
    """One whose answer does not end by itself: what a random model says differs between processors."""
    for number in range(40):
        messages = [{"role": "user", "content": f"Where is number {number}?"}]
        body: dict[str, object] = {"model": f"blockrag/{collection}", "messages": messages, "max_tokens": 1000}
        sent = (await http.post("/chat/completions", json=body)).json()
        if sent["choices"][0]["finish_reason"] == "length":
            return body
    pytest.fail("every answer ended by itself")


async def until_running(client: BlockragClient, sequences: int, *, seconds: float = 30) -> None:
    """Waits until the decoder computes so many."""
    async with asyncio.timeout(seconds):
        while (await client.describe()).decoder["running"] != sequences:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_documents_of_some_size_go_through(http: httpx.AsyncClient, client: BlockragClient) -> None:
    text = "".join(f"This is sentence number {number} of a long text about zinc. " for number in range(20_000))
    stored = await http.post(
        "/vector_stores/http-large/files", files={"file": ("large.txt", text.encode())}, timeout=300
    )
    assert stored.json()["status"] == "completed", stored.text
    try:
        (document,) = [found async for found in client.list_documents(collection="http-large")]
        assert document.passages > 1000
        gone = await http.delete("/files/http-large/large.txt")
        assert gone.json()["deleted"] is True
    finally:
        await client.delete_collection("http-large")


def test_a_replica_is_small(cluster: Cluster, http: httpx.AsyncClient) -> None:
    (pid,) = replica_pids("http", "Http")
    # a worker is a copy of a process that has imported everything: what they share counts once, by its parts
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    (line,) = [line for line in rollup.splitlines() if line.startswith("Pss:")]
    assert int(line.split()[1]) * 1024 < 150 * _MIB, line


@pytest.fixture(scope="module")
def guarded(cluster: Cluster) -> Iterator[str]:
    """Base URL of a second door and gateway in the same system, which have a tenant."""
    with warnings.catch_warnings():
        # Importing Serve warns about its own use of pydantic.
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray import serve

        from blockrag.gateway.deployment import Gateway
        from blockrag.http.deployment import Http

    tenant = TenantSettings(name="acme", api_key=_KEY)
    settings = cluster.settings.model_copy(update={"gateway": GatewaySettings(tenants=(tenant,))})
    for deployment, name in ((Gateway, "keyed"), (Http, "keyed_http")):
        made = serve.deployment(ray_actor_options={"num_cpus": 0.1})(deployment)
        bound = made.bind(settings) if name == "keyed" else made.bind(settings, "keyed")
        serve.run(bound, name=name, route_prefix=f"/{name}")
    yield cluster.system.http_url.replace("/v1", "/keyed_http/v1")
    for name in ("keyed_http", "keyed"):
        serve.delete(name)


async def test_a_key_decides_the_tenant(guarded: str, http: httpx.AsyncClient, collection: str) -> None:
    url = f"{guarded}/vector_stores/{collection}/search"
    for wrong in ({}, {"authorization": "Bearer wrong-key-0123456789"}):
        assert (await http.post(url, json={"query": "Norway"}, headers=wrong)).status_code == 401
    right = {"authorization": f"Bearer {_KEY}"}
    # The public tenant's collection is none of acme's, and acme's none of the public tenant's.
    assert (await http.post(url, json={"query": "Norway"}, headers=right)).status_code == 404
    file = {"file": ("own.txt", b"Acme keeps its plans in a zinc box.")}
    stored = await http.post(f"{guarded}/vector_stores/acme-plans/files", files=file, headers=right)
    assert stored.status_code == 200, stored.text
    models = await http.get(f"{guarded}/models", headers=right)
    assert [model["id"] for model in models.json()["data"]] == ["blockrag", "blockrag/acme-plans"]
    assert (await http.get("/files/acme-plans/own.txt")).status_code == 404
    assert (await http.delete(f"{guarded}/files/acme-plans/own.txt", headers=right)).status_code == 200


def test_the_page_in_a_browser(base_url: str, guarded: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    shots = Path(__file__).parents[2] / "out" / "page"
    addresses = [base_url.removesuffix("v1"), guarded.removesuffix("v1")]
    page = str(_CLIENTS / "page.py")
    assert "the page answers" in run("python", page, *addresses, _KEY, chromium, str(shots), seconds=280)
