"""``examples/`` against the running system."""

from __future__ import annotations

import shutil
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


@pytest.mark.parametrize("program", ["ask.mjs", "reflect.mjs"])
def test_ask_from_another_language(program: str, cluster: Cluster, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (EXAMPLES / "node_modules").is_dir():
        pytest.skip("needs Node.js, and make clients")
    document = tmp_path / "mill.txt"
    document.write_text("The mill of Vardholm grinds barley since 1790.", encoding="utf-8")
    run("ingest.py", str(document), "node", cluster.target)

    def ask(collection: str) -> subprocess.CompletedProcess[str]:
        command = [node, str(EXAMPLES / program), "What does the mill grind?", collection, cluster.target]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=EXAMPLES.parent)

    answered = ask("node")
    assert answered.returncode == 0, answered.stderr
    *services, answer, _ = answered.stdout.split("\n", 20) if program == "reflect.mjs" else ["", answered.stdout, ""]
    assert answer.strip()
    assert program == "ask.mjs" or "blockrag.v1.RagService" in services
    unknown = ask("no-such-collection")
    assert (unknown.returncode, "no-such-collection" in unknown.stderr) == (1, True)


def test_ingest_then_ask(cluster: Cluster, tmp_path: Path) -> None:
    document = tmp_path / "lighthouse.txt"
    document.write_text("The lighthouse of Vardholm was built by Ingrid Tveit in 1871.", encoding="utf-8")

    stored = run("ingest.py", str(document), "examples", cluster.target)
    answered = run("ask.py", "Who built the lighthouse of Vardholm?", "examples", cluster.target)

    assert "lighthouse.txt: 1 passages, created" in stored
    assert "encoded" in stored
    assert "first token after" in answered
    assert "[1] " in answered
