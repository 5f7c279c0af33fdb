from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.modeling.bundle import load_bundle
from tests.models import make_tiny_bundle
from tests.unit.training.adaptation.conftest import colour_rows, write_rows


def arguments(tmp_path: Path) -> list[str]:
    base = make_tiny_bundle(tmp_path / "base", max_position_embeddings=512)
    data = write_rows(tmp_path / "rows.jsonl", colour_rows(40))
    given = f"--model {base} --data {data} --out {tmp_path / 'adapted'} --steps 2 --batch-size 2 --max-passages 2"
    return ["adapt", "block", *given.split(), "--dev-rows", "2"]


def test_json_lines_of_progress_and_the_bundle(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments(tmp_path), "--json"])

    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line.get("step") for line in lines] == [0, 1, 2, None]
    assert lines[2]["tokens_per_second"] > 0
    assert load_bundle(lines[-1]["bundle"]).name == "adapted"


def test_text_names_the_next_step(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments(tmp_path))

    assert result.exit_code == 0, result.output
    assert "blockrag bundle verify" in result.stdout


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments(tmp_path), "--attention", "flex"])

    assert result.exit_code == 1
    assert "no backward pass of FlexAttention on cpu" in " ".join(result.output.split())


def test_workers_must_share_a_step_evenly(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments(tmp_path), "--workers", "0"])

    assert result.exit_code == 1
    assert "workers 0: must be at least 1" in " ".join(result.output.split())
