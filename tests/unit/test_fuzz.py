"""The fuzzers, for a few seconds each and from one seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("target", ["parsers", "prompts"])
def test_nothing_is_found_in_a_few_seconds(target: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.system.fuzz", target, "--seconds", "8", "--found", str(tmp_path)]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []
    runs = next(line for line in ended.stderr.splitlines() if "number_of_executed_units" in line)
    assert int(runs.split()[-1]) > 300
