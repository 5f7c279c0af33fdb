"""``blockrag demo`` in the running system, from the first ingest to the table; tests/system types it as it stands."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from blockrag.cli import demo
from blockrag.cli.main import app
from blockrag.client import BlockragClient
from blockrag.corpus.sample import articles_path, load_questions
from blockrag.local import LocalSystem
from tests.integration.conftest import Cluster


class Running(LocalSystem):
    """The shared system, which goes on when the demo ends."""

    def stop(self) -> None:
        pass


def _some_articles(folder: Path) -> Path:
    """A tenth of the sample corpus, and what the demo asks about: all of it takes minutes to ingest."""
    asked = {question.article for question in Random(0).sample(load_questions(), 5)}
    lines = gzip.decompress(articles_path().read_bytes()).splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines) if number % 10 == 0 or json.loads(line)["id"] in asked]
    path = folder / "articles.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(kept)))
    return path


async def _forget(target: str) -> None:
    """Removes what the demo has stored, and so what fills the cache."""
    async with BlockragClient(target) as client:
        for found in await client.list_collections():
            if found.name in ("almanac", "document"):
                await client.delete_collection(found.name)


@pytest.mark.timeout(600)
def test_the_demo(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalSystem, "start", lambda *_, **__: Running.attach(cluster.settings))
    monkeypatch.setattr(demo, "articles_path", lambda: _some_articles(tmp_path))
    own = tmp_path / "mill.txt"
    own.write_text("The mill of Arle has three wheels.", encoding="utf-8")

    try:
        result = CliRunner().invoke(
            app, ["demo", "--questions", "2", "--document", str(own), "--json"], catch_exceptions=False
        )
    finally:
        asyncio.run(_forget(cluster.target))

    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    rows = {row["name"]: row for row in shown["rows"]}
    assert len(rows) == 5
    assert all(row["questions"] == 2 and row["ttft_ms"] > 0 for row in rows.values())
    assert rows["no retrieval"]["cached_share"] < rows["block, from memory"]["cached_share"]
    assert rows["full attention"]["cached_tokens"] == 0
    assert [len(asked["expected"]) > 0 for asked in shown["shown"]] == [True, True, True, False]
    assert shown["warmed"]["done"] > 0
