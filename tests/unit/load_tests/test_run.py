"""``load_tests.run`` against a system that runs already, and its choices for one that it starts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from blockrag.settings import ClusterSettings, KvCacheSettings, Settings
from load_tests import run
from tests.unit.load_tests.server import FakeRag, serve

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(("delay_s", "code"), [(0.0, 0), (0.3, 1)])
async def test_the_exit_code_is_the_gates(tmp_path: Path, delay_s: float, code: int) -> None:
    arguments = ["--users", "1", "--seconds", "2", "--seed", "3", "--out", str(tmp_path / "out")]
    locust = ["--", "--think-s", "0", "--p95-first-token-ms", "250", "--least-answers", "2"]

    async with serve(FakeRag(delay_s=delay_s)) as rag:
        result = await asyncio.to_thread(run.main, ["--target", rag.target, *arguments, *locust])

    assert result == code
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["seed"] == 3
    assert {request.collection for request in rag.requests} == {"almanac"}
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "load_stats.csv").exists()


def test_a_system_of_its_own_leaves_one_in_use_alone(tmp_path: Path) -> None:
    given = Settings(
        cluster=ClusterSettings(state_dir="~/elsewhere", num_cpus=3), kv_cache=KvCacheSettings(budget_mb=77)
    )
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "old").touch()

    own = run.fresh_settings(given, tmp_path / "state")

    assert own.state_path == tmp_path / "state"
    assert not (tmp_path / "state").exists(), "an index left by another run would change the answers"
    assert {own.cluster.grpc_port, own.cluster.http_port}.isdisjoint({9000, 8000})
    assert (own.cluster.num_cpus, own.kv_cache) == (3, given.kv_cache)
