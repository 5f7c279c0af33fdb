"""``examples/`` against the running system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Cluster

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(example: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ingest_then_ask(cluster: Cluster, tmp_path: Path) -> None:
    document = tmp_path / "lighthouse.txt"
    document.write_text("The lighthouse of Vardholm was built by Ingrid Tveit in 1871.", encoding="utf-8")

    stored = run("ingest.py", str(document), "examples", cluster.target)
    answered = run("ask.py", "Who built the lighthouse of Vardholm?", "examples", cluster.target)

    assert "lighthouse.txt: 1 passages, created" in stored
    assert "encoded" in stored
    assert "first token after" in answered
    assert "[1] " in answered
