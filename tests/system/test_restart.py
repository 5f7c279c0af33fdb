"""What a system that was stopped and started again still knows."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.kv_cache.block_files import block_paths
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.results import Answer, Compression
from blockrag.settings import BundleSettings, ClusterSettings, KvCacheSettings, Settings

_TEXT = "The Arle Bridge was built in 1874. It is 212 metres long and was designed by Clara Voss."
_QUESTION = "Who designed the Arle Bridge?"


def _settings(state: Path, bundle: Path, shards: int) -> Settings:
    return Settings(
        bundle=BundleSettings(path=str(bundle)),
        cluster=ClusterSettings(
            grpc_port=free_port(), http_port=free_port(), object_store_mb=128, state_dir=str(state)
        ),
        kv_cache=KvCacheSettings(shards=shards, budget_mb=64, disk_mb=64),
    )


async def _ask(client: BlockragClient) -> Answer:
    return await client.ask(_QUESTION, collection="bridges", max_tokens=16, seed=3)


async def _first_life(target: str) -> Answer:
    async with BlockragClient(target) as client:
        await client.ingest_text("arle", _TEXT, title="Arle Bridge", collection="bridges")
        answer = await _ask(client)
        async with asyncio.timeout(60):
            while int((await client.describe()).kv_cache["disk"]["pending"]):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return answer


async def _second_life(target: str) -> tuple[Answer, int, set[str], int]:
    async with BlockragClient(target) as client:
        answer = await _ask(client)
        cache = (await client.describe()).kv_cache
        trace = await client.trace(answer.completion.trace_id)
        names = {span.name for span in trace}
        from_disk = sum(int(span.attributes["blockrag.disk"]) for span in trace if span.name == "kv_acquire")
        await client.delete_document("arle", collection="bridges")
        return answer, int(cache["misses"]), names, from_disk


async def _third_life(target: str) -> tuple[Answer, Answer]:
    """The question again, and with half of the passage."""
    async with BlockragClient(target) as client:
        whole, compression = await _ask(client), Compression(rate=2, policy="sentences")
        half = await client.ask(_QUESTION, collection="bridges", max_tokens=4, compression=compression)
        return whole, half


def _status(target: str, *options: str) -> str:
    command = [sys.executable, "-c", "from blockrag.cli.main import main; main()", "status", "--target", target]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout


@pytest.mark.own_cluster
@pytest.mark.timeout(600)
def test_the_first_answer_after_a_restart_comes_from_disk(small_bundle: Path, tmp_path: Path) -> None:
    with LocalSystem.start(_settings(tmp_path, small_bundle, 1), owned=True) as system:
        before = asyncio.run(_first_life(system.target))
    assert before.completion.usage.encoded_tokens > 0
    kept = {path: path.stat() for path in block_paths(tmp_path / "blocks")}
    assert len(kept) >= 2, "the instructions and the passage"
    assert {stat.S_IMODE(each.st_mode) for each in kept.values()} == {0o600}
    shutil.copytree(tmp_path / "index", tmp_path / "backup")
    # Another number of shards finds the same files.
    with LocalSystem.start(_settings(tmp_path, small_bundle, 2), owned=True) as system:
        after, misses, spans, from_disk = asyncio.run(_second_life(system.target))
        shown, as_json = _status(system.target), json.loads(_status(system.target, "--json"))
    assert after.text == before.text
    usage = after.completion.usage
    assert usage.disk_tokens == usage.cached_tokens == before.completion.usage.encoded_tokens
    assert (usage.encoded_tokens, usage.store_tokens, usage.l1_tokens, misses) == (0, 0, 0, 0)
    assert from_disk == len(kept)
    assert "encode" not in spans
    assert "on disk" in shown
    assert as_json["kv_cache"]["disk"]["hits"] == len(kept)
    # The document is deleted: its file is gone, the instructions' stays.
    assert len(set(block_paths(tmp_path / "blocks"))) == 1
    # Restored as docs/operations.md says, the document is back, and its block is encoded again.
    shutil.rmtree(tmp_path / "index")
    shutil.copytree(tmp_path / "backup", tmp_path / "index")
    with LocalSystem.start(_settings(tmp_path, small_bundle, 2), owned=True) as system:
        restored, half = asyncio.run(_third_life(system.target))
    assert restored.text == before.text
    assert restored.completion.usage.encoded_tokens > 0
    # Sentences are taken out of the block that is cached already.
    (citation,) = half.completion.citations
    read = [chunk.text for chunk in citation.chunks if chunk.form == "expanded"]
    assert 0 < len(read) < len(citation.chunks)
    assert sum(chunk.end_token - chunk.start_token for chunk in citation.chunks) == citation.tokens
    assert {chunk.form for chunk in citation.chunks} == {"expanded", "dropped"}
    assert half.completion.usage.encoded_tokens == 0
    assert half.completion.usage.prompt_tokens < restored.completion.usage.prompt_tokens
