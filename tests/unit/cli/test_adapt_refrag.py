from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.modeling.bundle import load_bundle
from tests.models import make_tiny_bundle
from tests.unit.training.adaptation.conftest import colour_rows, write_rows
from tests.unit.training.refrag.conftest import write_texts


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a short stage, without bundle, stage and out."""
    texts = write_texts(tmp_path / "texts.jsonl")
    rows = write_rows(tmp_path / "rows.jsonl", colour_rows(40))
    given = f"--text {texts} --data {rows} --steps 1 --tokens-per-step 400 --max-passages 2 --dev-samples 2"
    return ["adapt", "refrag", *given.split()]


def test_every_stage_in_turn(tmp_path: Path, arguments: list[str]) -> None:
    bundle = make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)
    for stage in ("reconstruction", "pretrain", "mixed", "tune", "policy"):
        out = tmp_path / stage
        chosen = ["-k", "4"] if stage == "reconstruction" else []
        given = ["--bundle", str(bundle), "--stage", stage, "--out", str(out), *chosen]
        result = CliRunner().invoke(app, [*arguments, *given, "--json"])

        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [line.get("step") for line in lines] == [0, 1, None]
        assert lines[-1] == {"bundle": str(out), "run": f"{out}.run"}
        bundle = out

    made = load_bundle(bundle)
    assert made.refrag is not None and made.chunk_tokens == 4
    assert [stage["stage"] for stage in made.refrag.training] == ["reconstruction", "pretrain", "mixed", "tune"]
    assert list(made.refrag.policies) == ["query"]


def test_text_shows_what_was_measured_and_the_next_step(tmp_path: Path, arguments: list[str]) -> None:
    base = make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)
    given = ["--bundle", str(base), "--stage", "pretrain", "--out", str(tmp_path / "made"), "-k", "4"]
    result = CliRunner().invoke(app, [*arguments, *given])

    assert result.exit_code == 0, result.output
    assert "held out, text, compressed" in result.output
    assert "blockrag bundle verify" in result.stdout


def test_errors_are_one_line(tmp_path: Path, arguments: list[str]) -> None:
    base = make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)
    for given, problem in (
        (["--stage", "pretrain", "--workers", "2"], "optimizer 'muon': several workers"),
        (["--stage", "pretrain", "--workers", "0"], "workers 0: must be at least 1"),
        (["--stage", "policy", "--workers", "2"], "has no chunk compression"),
        (["--stage", "pretrain", "-k", "999"], "chunk_tokens 999: longer than a passage"),
        (["--stage", "pretrain", "--minutes", "1"], "exactly one of minutes and steps"),
    ):
        result = CliRunner().invoke(app, [*arguments, "--bundle", str(base), "--out", str(tmp_path / "made"), *given])
        assert result.exit_code == 1, result.output
        assert problem in " ".join(result.output.split())
        assert "Traceback" not in result.output


def test_a_frozen_decoder_and_a_policy_that_goes_on(tmp_path: Path, arguments: list[str]) -> None:
    base = make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)

    def run(bundle: Path, out: str, *given: str) -> Path:
        made = tmp_path / out
        result = CliRunner().invoke(app, [*arguments, "--bundle", str(bundle), "--out", str(made), *given])
        assert result.exit_code == 0, result.output
        return made

    learnt = ["--freeze-decoder", "--distillation", "0.5", "--targets", "2", "--compressed-share", "0.6", "-k", "4"]
    made = run(base, "mixed", "--stage", "mixed", *learnt)
    record = load_bundle(made).refrag
    assert record is not None
    stage = record.training[-1]
    assert (stage["train_decoder"], stage["distillation"], stage["targets"], stage["compressed_share"]) == (
        *(False, 0.5, 2, 0.6),
    )
    assert load_bundle(made).fingerprint == load_bundle(base).fingerprint
    policy = ["--stage", "policy", "--policy", "blind", "--policy-width", "32", "--text-share", "1.0"]
    first = run(made, "first", *policy, "--draws", "3", "--text-reward", "divergence", "--imitation", "0")
    second = run(made, "second", *policy, "--start-from", str(first / "policy-blind.safetensors"))
    records = [load_bundle(bundle).refrag for bundle in (first, second)]
    assert records[0] is not None and records[1] is not None
    recipes = [found.policies["blind"].facts["recipe"] for found in records if found is not None]
    assert [recipe["ppo"]["draws"] for recipe in recipes] == [3, 8]
    assert [recipe["text_reward"] for recipe in recipes] == ["divergence", "label"]
    assert recipes[0]["start"] == "" and len(recipes[1]["start"]) == 64
