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
import torch
from safetensors.torch import load_file

from blockrag.errors import SetupError
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.training.refrag.policy_stage import sizes_of, train_policy
from blockrag.training.refrag.stage_config import PolicyTrainingConfig, PpoSettings, RefragConfig
from blockrag.training.refrag.stages import adapt_refrag
from blockrag.training.run import StepMetrics

_WORKER = """
import pickle, sys
import torch
import torch.distributed as dist
from blockrag.training.workers import ShardedWorkers
from blockrag.training.refrag.stages import adapt_refrag
with open(sys.argv[1], "rb") as file:
    configs = pickle.load(file)
dist.init_process_group("gloo")
for config in configs:
    adapt_refrag(config, ShardedWorkers(torch.device("cpu")))
dist.destroy_process_group()
"""


def records(config: RefragConfig) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def run_two(program: str, argument: Path, meanwhile: Callable[[], object]) -> None:
    """Two processes that are joined, and what this one does until they end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(argument)]
    workers = [subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}) for rank in range(2)]
    try:
        meanwhile()
        assert [worker.wait(timeout=150) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_two_workers_equal_one(tmp_path: Path, config: Callable[..., RefragConfig]) -> None:
    # with six parts, some have no samples: their worker must go through the same exchanges
    wanted = [
        config(stage=stage, optimizer="adamw", parts=parts, out=tmp_path / f"one-{stage}")
        for stage, parts in (("reconstruction", 2), ("mixed", 2), ("tune", 6))
    ]
    shared = [replace(one, out=tmp_path / one.out.name.replace("one", "two")) for one in wanted]
    (tmp_path / "configs").write_bytes(pickle.dumps(shared))
    run_two(_WORKER, tmp_path / "configs", lambda: [adapt_refrag(one) for one in wanted])

    for one, two in zip(wanted, shared, strict=True):
        assert load_bundle(two.out).refrag is not None
        for a, b in zip(records(one), records(two), strict=True):
            assert a.get("losses", {}) == pytest.approx(b.get("losses", {}), rel=1e-4)
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
            for label, values in a.get("dev", {}).items():
                assert values["nats"] == pytest.approx(b["dev"][label]["nats"], rel=1e-3)


_POLICY_WORKER = """
import pickle, sys
import torch
import torch.distributed as dist
from blockrag.training.workers import ShardedWorkers
from blockrag.training.refrag.policy_stage import train_policy
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
dist.init_process_group("gloo")
train_policy(config, workers=ShardedWorkers(torch.device("cpu")))
dist.destroy_process_group()
"""


def test_a_policy_learns_the_same_from_two_workers(tmp_path: Path, config: Callable[..., RefragConfig]) -> None:
    made = adapt_refrag(config(stage="reconstruction", steps=1, dev_samples=0, out=tmp_path / "parts"))
    one = PolicyTrainingConfig(
        bundle=made,
        out=tmp_path / "one",
        text=config().text,
        policy="blind",
        steps=4,
        contexts=3,  # an odd number: the workers have different shares
        max_passages=3,
        dev_samples=2,
        checkpoint_steps=2,
        precision="fp32",
        threads=1,
        learning_rate=1e-2,
        ppo=PpoSettings(fractions=(0.2, 0.5)),
    )
    two = replace(one, out=tmp_path / "two")
    (tmp_path / "config").write_bytes(pickle.dumps(two))
    run_two(_POLICY_WORKER, tmp_path / "config", lambda: train_policy(one))

    single, shared = (load_file(path / "policy-blind.safetensors") for path in (one.out, two.out))
    before = ChunkPolicy(sizes_of(one, 32)).state_dict()
    for name, tensor in single.items():
        # What is added to every logit changes no choice: its gradient is rounding, which Adam makes a step of.
        if name != "score.bias":
            torch.testing.assert_close(shared[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    assert float(single["direct.weight"].abs().max()) > 1e-3 and not before["direct.weight"].any()
    lines = [
        [StepMetrics(**json.loads(line)) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (one.run_dir, two.run_dir)
    ]
    assert [metrics.step for metrics in lines[1]] == [0, 1, 2, 3, 4]
    for first, second in zip(*lines, strict=True):
        assert first.tokens == second.tokens
        assert ("reward" in first.further) == (first.step > 0)
        if first.step:
            assert first.further["reward"] == pytest.approx(second.further["reward"], rel=1e-4)
    assert lines[1][-1].dev


def test_what_workers_cannot_share_is_refused(config: Callable[..., RefragConfig]) -> None:
    from blockrag.training.refrag.stages import prepare

    with pytest.raises(SetupError, match="parts 2: no multiple of 3 workers"):
        prepare(config(optimizer="adamw"), 3)
    with pytest.raises(SetupError, match="optimizer 'muon'"):
        prepare(config(), 2)
