"""A process that ends what it started and begins again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockrag.errors import UnavailableError
from blockrag.local.again import end_others

_PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from blockrag.local.again import become, end_others

if len(sys.argv) == 1:
    children = [subprocess.Popen(["sleep", "100"]), subprocess.Popen(["sleep", "100"], process_group=0)]
    between = os.fork()
    if between == 0:  # leaves a child behind whose parent is gone
        print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
        os._exit(0)
    os.waitpid(between, 0)
    print(*[child.pid for child in children], os.getpid(), flush=True)
    opened = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(opened, True)
    end_others()
    become("program", ["again"], {"PATH": "", "PYTHONPATH": os.environ["PYTHONPATH"], "LEFT": "1"})
print(os.getpid(), os.environ.get("LEFT"), len(os.listdir("/proc/self/fd")))
print(Path("/proc/self/task", str(os.getpid()), "children").read_text() or "none")
"""


def test_what_was_started_ends_and_the_process_begins_again(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM)
    services = Path(__file__).parents[3] / "services"
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{services}"},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *started, pid, same, left, descriptors, children = done.stdout.split()
    assert (same, left, children) == (pid, "1", "none")
    assert int(descriptors) == 4  # the standard ones and that of the listing
    until = time.monotonic() + 5
    while any(Path(f"/proc/{each}").exists() for each in started):  # whoever adopted the orphan reaps it
        assert time.monotonic() < until
        time.sleep(0.01)


def test_nothing_of_somebody_else_s_session_is_ended() -> None:
    if os.getsid(0) == os.getpid():
        pytest.skip("this process leads its session")
    with pytest.raises(UnavailableError, match="session"):
        end_others()
