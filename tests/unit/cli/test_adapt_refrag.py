from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from blockrag.cli.main import app
from blockrag.modeling.bundle import load_bundle
from tests.models import make_tiny_bundle
from tests.unit.training.adaptation.conftest import colour_rows, write_rows
from tests.unit.training.refrag.conftest import write_texts


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Options with texts and with question rows."""
    texts = write_texts(tmp_path / "texts.jsonl")
    rows = write_rows(tmp_path / "rows.jsonl", colour_rows(40))
    return f"--text {texts}", f"--data {rows}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)


def run(stage: str, *given: object) -> Result:
    common = f"{stage} --steps 1 --max-passages 2 --dev-samples 2"
    common += "" if stage == "policy" else " --tokens-per-step 400"
    return CliRunner().invoke(app, ["adapt", "refrag", *common.split(), *" ".join(map(str, given)).split()])


def test_every_stage_in_turn(tmp_path: Path, base: Path, files: tuple[str, str]) -> None:
    bundle = base
    for stage in ("reconstruction", "pretrain", "mixed", "tune", "policy"):
        out = tmp_path / stage
        chosen = ["-k 4"] if stage == "reconstruction" else []
        data = files if stage in ("tune", "policy") else files[:1]
        result = run(stage, *data, "--bundle", bundle, "--out", out, *chosen, "--json")

        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [line.get("step") for line in lines] == [0, 1, None]
        assert lines[-1] == {"bundle": str(out), "run": f"{out}.run"}
        bundle = out

    made = load_bundle(bundle)
    assert made.refrag is not None and made.chunk_tokens == 4
    assert [stage["stage"] for stage in made.refrag.training] == ["reconstruction", "pretrain", "mixed", "tune"]
    assert list(made.refrag.policies) == ["query"]


def test_text_shows_what_was_measured_and_the_next_step(tmp_path: Path, base: Path, files: tuple[str, str]) -> None:
    result = run("pretrain", files[0], "--bundle", base, "--out", tmp_path / "made", "-k 4")

    assert result.exit_code == 0, result.output
    assert "held out, text, compressed" in result.output
    assert "blockrag bundle verify" in result.stdout


@pytest.mark.parametrize(
    ("stage", "given", "problem"),
    [
        ("pretrain", "--workers 2", "optimizer 'muon': several workers"),
        ("pretrain", "--workers 0", "workers 0: must be at least 1"),
        ("policy", "--workers 2", "has no chunk compression"),
        ("pretrain", "-k 999", "chunk_tokens 999: longer than a passage"),
        ("pretrain", "--minutes 1", "exactly one of minutes and steps"),
        ("policy", "--draws 1", "at least two draws"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, base: Path, files: tuple[str, str], stage: str, given: str, problem: str
) -> None:
    result = run(stage, files[0], "--bundle", base, "--out", tmp_path / "made", given)
    assert result.exit_code == 1, result.output
    assert problem in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("reconstruction", "--full-share 0.5"),
        ("pretrain", "--no-curriculum"),
        ("pretrain", "--data rows.jsonl"),
        ("mixed", "--text-share 0.5"),
        ("tune", "--policy blind"),
        ("policy", "--tokens-per-step 300"),
    ],
)
def test_an_option_of_another_stage_is_refused(tmp_path: Path, stage: str, option: str) -> None:
    result = run(stage, "--out", tmp_path / "made", option)
    assert result.exit_code == 2
    assert "No such option" in result.output and option.split()[0] in result.output


def test_a_frozen_decoder_and_a_policy_that_goes_on(tmp_path: Path, base: Path, files: tuple[str, str]) -> None:
    def make(stage: str, bundle: Path, out: str, *given: str) -> Path:
        result = run(stage, files[0], "--bundle", bundle, "--out", tmp_path / out, *given)
        assert result.exit_code == 0, result.output
        return tmp_path / out

    learnt = ["--freeze-decoder", "--distillation", "0.5", "--targets", "2", "--compressed-share", "0.6", "-k", "4"]
    made = make("mixed", base, "mixed", *learnt)
    record = load_bundle(made).refrag
    assert record is not None
    stage = record.training[-1]
    assert (stage["train_decoder"], stage["distillation"], stage["targets"], stage["compressed_share"]) == (
        *(False, 0.5, 2, 0.6),
    )
    assert load_bundle(made).fingerprint == load_bundle(base).fingerprint
    policy = ["--policy", "blind", "--policy-width", "32", "--text-share", "1.0"]
    first = make("policy", made, "first", *policy, "--draws", "3", "--text-reward", "divergence", "--imitation", "0")
    second = make("policy", made, "second", *policy, "--start-from", str(first / "policy-blind.safetensors"))
    records = [load_bundle(bundle).refrag for bundle in (first, second)]
    assert records[0] is not None and records[1] is not None
    recipes = [found.policies["blind"].facts["recipe"] for found in records if found is not None]
    assert [recipe["ppo"]["draws"] for recipe in recipes] == [3, 8]
    assert [recipe["text_reward"] for recipe in recipes] == ["divergence", "label"]
    assert recipes[0]["start"] == "" and len(recipes[1]["start"]) == 64
