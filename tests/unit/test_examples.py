"""``examples/`` that need no running system; the others are in tests/integration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_tiny_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_answer_in_this_process() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "in_process.py")], capture_output=True, text=True, timeout=200, check=False
    )

    assert result.returncode == 0, result.stderr
    answers = dict(re.findall(r"^(\w+): '(.*)' from", result.stdout, re.M))
    assert answers.keys() == {"block", "full", "none"}
    assert "Galdhopiggen" in answers["block"]
    assert "Galdhopiggen" not in answers["none"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_model_of_one_s_own(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "model")
    row = {"question": "What is it?", "answers": ["zinc"], "passages": [{"text": "It is zinc.", "gold": True}]}
    (tmp_path / "questions.jsonl").write_text((json.dumps(row) + "\n") * 20, encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    result = subprocess.run(
        ["sh", str(EXAMPLES / "own_model.sh"), "model", "questions.jsonl"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "STEPS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert "blockrag up" in result.stdout
