"""Two workers that share the weights compute what one computes alone."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockrag.errors import SetupError
from blockrag.modeling.bundle import load_bundle
from blockrag.training.refrag.adapt import adapt_refrag
from blockrag.training.refrag.config import RefragConfig

_WORKER = """
import pickle, sys
import torch
import torch.distributed as dist
from blockrag.training.adaptation.workers import ShardedWorkers
from blockrag.training.refrag.adapt import adapt_refrag
with open(sys.argv[1], "rb") as file:
    configs = pickle.load(file)
dist.init_process_group("gloo")
for config in configs:
    adapt_refrag(config, ShardedWorkers(torch.device("cpu")))
dist.destroy_process_group()
"""


def records(config: RefragConfig) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_workers_equal_one(tmp_path: Path, config: Callable[..., RefragConfig]) -> None:
    # with six parts, some have no samples: their worker must go through the same exchanges
    wanted = [
        config(stage=stage, optimizer="adamw", parts=parts, out=tmp_path / f"one-{stage}")
        for stage, parts in (("reconstruction", 2), ("mixed", 2), ("tune", 6))
    ]
    shared = [replace(one, out=tmp_path / one.out.name.replace("one", "two")) for one in wanted]
    (tmp_path / "configs").write_bytes(pickle.dumps(shared))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WORKER, str(tmp_path / "configs")]
    workers = [subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}) for rank in range(2)]
    for one in wanted:
        adapt_refrag(one)
    try:
        assert [worker.wait(timeout=90) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()

    for one, two in zip(wanted, shared, strict=True):
        assert load_bundle(two.out).refrag is not None
        for a, b in zip(records(one), records(two), strict=True):
            assert a.get("losses", {}) == pytest.approx(b.get("losses", {}), rel=1e-4)
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
            for label, values in a.get("dev", {}).items():
                assert values["nats"] == pytest.approx(b["dev"][label]["nats"], rel=1e-3)


def test_what_workers_cannot_share_is_refused(config: Callable[..., RefragConfig]) -> None:
    from blockrag.training.refrag.adapt import prepare

    with pytest.raises(SetupError, match="parts 2: no multiple of 3 workers"):
        prepare(config(optimizer="adamw"), 3)
    with pytest.raises(SetupError, match="optimizer 'muon'"):
        prepare(config(), 2)
