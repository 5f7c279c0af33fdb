"""Metrics of the running system, as Prometheus scrapes them, and the commands that read them."""

from __future__ import annotations

import asyncio
import json
import time

from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.cli.top import PREFIX, Scrape
from blockrag.client import BlockragClient
from tests.integration.conftest import Cluster
from tests.unit.deploy.monitoring import series_used

# They appear with the first eviction, refusal, failure and so on, which a healthy system does without.
_RARE = ("admission_rejections", "evictions", "expirations", "_lost", "_joined")
_PATIENCE_S = 40.0


async def test_what_dashboards_and_alerts_ask_for_is_exported(cluster: Cluster, client: BlockragClient) -> None:
    await client.ingest_text("metrics.txt", "Lima is the capital of Peru.", collection="metrics")
    for _ in range(2):
        await client.ask("What is the capital of Peru?", collection="metrics")
    wanted = {
        name.removeprefix(PREFIX)
        for name in series_used()
        if name.startswith(PREFIX) and not any(rare in name for rare in _RARE)
    }

    deadline = time.monotonic() + _PATIENCE_S
    missing = wanted
    while missing and time.monotonic() < deadline:
        await asyncio.sleep(1)
        missing = wanted - {name for name, _ in Scrape.of(cluster.system.metrics_url).series}
    assert not missing
    await client.delete_collection("metrics")


def test_top_reads_what_happens(cluster: Cluster) -> None:
    options = ["--target", cluster.target, "--metrics", cluster.system.metrics_url, "--readings", "2"]
    result = CliRunner().invoke(app, ["top", *options, "--interval", "0.5", "--json"])
    assert result.exit_code == 0, result.output
    readings = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(readings) == 2
    assert readings[1]["down"] == [] and readings[1]["tiers"]["l1"]["budget_bytes"] == 64 * 2**20

    shown = CliRunner().invoke(app, ["top", *options[:-1], "1", "--interval", "0.5"])
    assert shown.exit_code == 0 and "first token, ms" in shown.output and "store" in shown.output
