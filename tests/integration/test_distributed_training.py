"""``blockrag adapt … --workers 2``: the real command, its own Ray, two CPU workers that share the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from blockrag.modeling.verify import verify_bundle
from blockrag.training.adaptation.block import adapt_block
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from tests.models import make_tiny_bundle, make_tiny_checkpoint
from tests.unit.training.adaptation.conftest import colour_rows, write_rows
from tests.unit.training.refrag.conftest import write_texts

RECIPE: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "max_passages": 4,
    "max_tokens": 400,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "dev_rows": 3,
    "distillation": 1.0,
    "link_tokens": 1,
    "precision": "fp32",
    "checkpoint_steps": 3,
}


def command(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = {"model": checkpoint, "data": data, "out": out, **RECIPE}
    options = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-c", "from blockrag.cli.main import main; main()", "adapt", "block", *options, *more]


def environment() -> dict[str, str]:
    # a Ray of the command's own, whatever this process is connected to
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}


def records(out: Path) -> list[dict[str, Any]]:
    text = (out.parent / f"{out.name}.run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_two_workers_learn_what_one_does(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", max_position_embeddings=512)
    data = write_rows(tmp_path / "rows.jsonl", colour_rows(80))
    alone = adapt_block(BlockAdaptConfig(model=checkpoint, data=(data,), out=tmp_path / "one", **RECIPE))

    ran = subprocess.run(
        [*command(checkpoint, data, tmp_path / "two", "--workers", "2", "--json")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert ran.returncode == 0, ran.stderr
    two = tmp_path / "two"
    for one_step, two_step in zip(records(alone)[1:], records(two)[1:], strict=True):
        assert one_step["step"] == two_step["step"] and one_step["tokens"] == two_step["tokens"]
        assert set(one_step["losses"]) == {"block", "full", "distillation"}
        assert two_step["losses"] == pytest.approx(one_step["losses"], rel=1e-3), one_step["step"]
        assert two_step["gradient_norm"] == pytest.approx(one_step["gradient_norm"], rel=1e-3)
    for mask, scores in records(alone)[-1]["dev"].items():
        assert records(two)[-1]["dev"][mask] == pytest.approx(scores, rel=1e-3)
    one_weights, two_weights = (load_file(out / "decoder" / "model.safetensors") for out in (alone, two))
    for name, tensor in one_weights.items():
        assert float((tensor - two_weights[name]).abs().max()) < 2e-3, name
    assert verify_bundle(two).passed
    shown = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line.get("step") for line in shown] == [*range(9), None], "progress reaches the command"
    assert not (tmp_path / "two.run" / "ray").exists()
    manifest = json.loads((two / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["training"]["workers"] == 2


def test_what_a_user_must_change_is_said_before_ray_starts_workers(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", max_position_embeddings=512)
    data = write_rows(tmp_path / "rows.jsonl", colour_rows(10))

    ran = subprocess.run(
        command(checkpoint, data, tmp_path / "out", "--workers", "3"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert ran.returncode == 1
    assert "batch_size 4 is no multiple of 3 workers" in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


def test_a_refrag_stage_on_two_workers(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)
    write_texts(tmp_path / "texts.jsonl")
    recipe = (
        "mixed --bundle base --text texts.jsonl -k 4 --steps 3 --tokens-per-step 600 --max-passages 3 "
        "--dev-samples 2 --optimizer adamw --precision fp32 --json"
    )
    shown = {}
    for workers in (1, 2):
        ran = subprocess.run(
            [
                *(sys.executable, "-c", "from blockrag.cli.main import main; main()", "adapt", "refrag"),
                *recipe.split(),
                *("--out", f"made{workers}", "--workers", str(workers)),
            ],
            cwd=tmp_path,  # with paths of its own: workers have other directories
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ran.returncode == 0, ran.stderr
        shown[workers] = [json.loads(line) for line in ran.stdout.splitlines()]

    for one, two in zip(shown[1][:-1], shown[2][:-1], strict=True):
        assert one.get("losses", {}).keys() == two.get("losses", {}).keys()
        for kind, loss in one.get("losses", {}).items():
            assert loss == pytest.approx(two["losses"][kind], rel=1e-4)
    assert verify_bundle(tmp_path / "made2").passed


def test_a_policy_on_two_workers(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)
    write_texts(tmp_path / "texts.jsonl")
    common = "--text texts.jsonl --max-passages 3 --dev-samples 2 --precision fp32 --json"
    stages = (
        ("parts", "reconstruction --bundle base -k 4 --steps 1 --tokens-per-step 400"),
        ("made1", "policy --bundle parts --policy blind --steps 2"),
        ("made2", "policy --bundle parts --policy blind --steps 2 --workers 2"),
    )
    shown = {}
    for out, given in stages:
        ran = subprocess.run(
            [
                *(sys.executable, "-c", "from blockrag.cli.main import main; main()", "adapt", "refrag"),
                *(*given.split(), *common.split(), "--out", out),
            ],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ran.returncode == 0, ran.stderr
        shown[out] = [json.loads(line) for line in ran.stdout.splitlines()]

    for one, two in zip(shown["made1"][:-1], shown["made2"][:-1], strict=True):
        assert one["tokens"] == two["tokens"]
        rewards = [metrics["further"]["reward"] if metrics["step"] else 0.0 for metrics in (one, two)]
        assert rewards[0] == pytest.approx(rewards[1], rel=1e-3)
    assert verify_bundle(tmp_path / "made2").passed
