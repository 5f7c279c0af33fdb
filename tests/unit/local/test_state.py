import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blockrag.errors import DataError
from blockrag.local.state import own_state, process_start_ticks, read_state, state_file, write_state


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = replace(own_state("127.0.0.1:9000"), ray_address="10.0.0.1:1234").with_phase("ready")
    write_state(tmp_path / "deep", state)
    assert read_state(tmp_path / "deep") == state
    assert state.alive


def test_no_file_means_nothing_runs(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "unknown": 2}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    state_file(tmp_path).write_text(text)
    with pytest.raises(DataError, match=r"system\.json"):
        read_state(tmp_path)


def test_an_ended_process_is_not_alive_even_before_it_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process_start_ticks(process.pid) > 0
        process.kill()
        # Waits for the end without reaping: the process id stays taken.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_start_ticks(process.pid) == -1
    assert process_start_ticks(process.pid) == -1
