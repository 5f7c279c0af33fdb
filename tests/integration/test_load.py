"""The load test against the running system: hot and cold passages, all attention modes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from blockrag.client import BlockragClient
from blockrag.corpus.sample import load_articles, load_questions
from load_tests import run
from load_tests.mix import Mix
from tests.integration.conftest import Cluster

COLLECTION = "load-test"
SEED = 5


async def test_users_are_answered_within_the_service_level(
    cluster: Cluster, client: BlockragClient, tmp_path: Path
) -> None:
    hottest = Mix(tuple(load_questions()), SEED).articles()[:8]
    articles = {article.id: article for article in load_articles()}
    for name in hottest:
        article = articles[name]
        await client.ingest_text(
            article.id, article.text, collection=COLLECTION, title=article.title, media_type="text/markdown"
        )
    arguments = ["--target", cluster.target, "--users", "2", "--seconds", "8", "--seed", str(SEED)]
    # Two cores under a test run are slow: what counts here is that every answer comes.
    locust = ["--collection", COLLECTION, "--think-s", "0.2", "--p95-first-token-ms", "20000", "--least-answers", "4"]

    code = await asyncio.to_thread(run.main, [*arguments, "--out", str(tmp_path), "--", *locust])

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert code == 0, summary["verdict"]
    assert summary["verdict"]["failures"] == 0
    tokens = summary["prompt_tokens"]
    assert tokens["l1_tokens"] + tokens["store_tokens"] > 0, "hot passages are found in a cache"
    assert tokens["encoded_tokens"] > 0, "cold ones are encoded"
