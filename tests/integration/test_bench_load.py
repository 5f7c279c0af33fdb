"""``blockrag bench load`` against the running system."""

from __future__ import annotations

from blockrag.client import BlockragClient
from blockrag.evaluation.load import measure_load
from blockrag.evaluation.ttft_grpc import first_passages
from blockrag.modeling.bundle import load_bundle
from blockrag.simulation.scenario import Scenario, StageTimes
from tests.integration.conftest import Cluster


async def test_open_loop_load_is_counted_as_it_was_answered(client: BlockragClient, cluster: Cluster) -> None:
    bundle = load_bundle(cluster.settings.bundle.path, verify_files=False)
    scenario = Scenario(passages=20, questions=20, top_k=3, variety=5, answer_tokens=2, max_sequences=8)
    seen: list[tuple[int, int]] = []

    rows = await measure_load(
        client,
        scenario,
        first_passages(bundle, scenario.passages),
        [4.0],
        ["block", "full"],
        StageTimes(),
        target_s=30.0,
        on_progress=lambda done, total: seen.append((done, total)),
    )

    block, full = rows
    assert [(row.mode, row.asked, row.failed) for row in rows] == [("block", 20, 0), ("full", 20, 0)]
    assert 0 < block.ttft_p50 <= block.ttft_p95 <= block.ttft_p99
    # 20 passages, of which the questions that warm the caches have left most there
    assert block.held > 0.5 and abs(sum(block.shares.values()) - 1) < 1e-9
    assert full.held == 0
    assert block.goodput > 0 and block.predicted_p50 > 0
    assert seen[-1] == (48, 48)
