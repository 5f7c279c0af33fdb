"""A run whose process is killed goes on where it was and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockrag.modeling.bundle import load_bundle

STEPS = 24


def start(checkpoint: Path, data: Path, out: Path) -> subprocess.Popen[bytes]:
    arguments = {
        "--model": checkpoint,
        "--data": data,
        "--out": out,
        "--steps": STEPS,
        "--batch-size": 4,
        "--max-passages": 4,
        "--max-tokens": 400,
        "--learning-rate": 3e-3,
        "--dev-rows": 4,
        "--checkpoint-steps": 4,
    }
    command = [sys.executable, "-c", "from blockrag.cli.main import main; main()", "adapt", "block"]
    command += [str(part) for pair in arguments.items() for part in pair]
    # one thread: the same sums in the same order, so that the results can be compared bit by bit
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def records(out: Path) -> list[dict[str, Any]]:
    path = out.parent / f"{out.name}.run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_and_started_again(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(checkpoint, data, whole)
    process = start(checkpoint, data, killed)
    deadline = time.monotonic() + 120
    while max((record["step"] for record in records(killed)), default=0) < 6:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert not killed.exists()
    assert list((tmp_path / "killed.run").glob("checkpoint-*")), "killed before the first checkpoint"

    finish(start(checkpoint, data, killed))
    finish(uninterrupted)

    one, other = (load_file(out / "decoder" / "model.safetensors") for out in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = ("step", "losses", "tokens", "dev")
    one_log, other_log = ([{k: r.get(k) for k in kept} for r in records(out)] for out in (whole, killed))
    assert one_log == other_log
    assert [record["step"] for record in other_log] == list(range(STEPS + 1))
    before = load_bundle(whole).training["dev_scores"]["before"]
    assert load_bundle(killed).training["dev_scores"]["before"] == before
