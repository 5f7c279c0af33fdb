"""A process whose work is done by one child after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockrag.errors import UnavailableError
from blockrag.local.lives import AGAIN, end_others

_SERVICES = Path(__file__).parents[3] / "services"
_PROGRAM = """
import os, signal, subprocess, sys, threading
from blockrag.local.lives import AGAIN, Lives, end_others

spared = subprocess.Popen(["sleep", "100"])
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
imported = []

def work():
    started = [subprocess.Popen(["sleep", "100"]), subprocess.Popen(["sleep", "100"], process_group=0)]
    between = os.fork()
    if between == 0:  # leaves a child behind whose parent is gone
        print("started", subprocess.Popen(["sleep", "100"]).pid, flush=True)
        os._exit(0)
    os.waitpid(between, 0)
    print("started", *[child.pid for child in started], flush=True)
    imported.append(os.getpid())  # a child sees what this process had, and not what another child did
    print("life", *imported, os.getppid(), flush=True)
    {}

lives = Lives(work, stop, while_input={})
statuses = []
try:
    while not statuses or statuses[-1] == AGAIN:
        if statuses:
            end_others([spared.pid])
        statuses.append(lives.one())
        if len(statuses) == 3:
            break
    end_others([spared.pid])
    print("statuses", *statuses, "stopped" if stop.is_set() else "", "spared", spared.poll(), os.getpid(), flush=True)
finally:
    spared.kill()
"""


def run(work: str, *, while_input: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(work, while_input)],
        env=os.environ | {"PYTHONPATH": str(_SERVICES)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def begun(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Waits for its first life. Returns that one's process id and what it started."""
    assert process.stdout is not None
    started: list[str] = []
    while (line := process.stdout.readline().split())[0] != "life":
        started += line[1:]
    return line[1], started


def finished(process: subprocess.Popen[str]) -> dict[str, list[list[str]]]:
    """What it printed, by the first word."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    said: dict[str, list[list[str]]] = {}
    for line in output.splitlines():
        first, *rest = line.split()
        said.setdefault(first, []).append(rest)
    return said


def gone(pids: list[str]) -> bool:
    """Whether they are, within the time in which whoever adopted orphans reaps them."""
    until = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_what_a_life_leaves_ends_and_the_next_one_begins() -> None:
    said = finished(run("return AGAIN"))

    (*statuses, spared, is_none, pid) = said["statuses"][0]
    assert (statuses, spared, is_none) == ([str(AGAIN)] * 3, "spared", "None")
    assert [parent for *_, parent in said["life"]] == [pid] * 3
    assert len({child for child, _ in said["life"]}) == 3
    assert len(said["started"]) == 6
    assert gone([each for line in said["started"] for each in line])


def test_a_life_that_was_killed_says_by_what() -> None:
    said = finished(run("os.kill(os.getpid(), signal.SIGKILL)"))
    assert said["statuses"][0][0] == str(-signal.SIGKILL)


def test_a_life_that_fails_ends_with_1() -> None:
    said = finished(run("raise ValueError"))
    assert said["statuses"][0][0] == "1"


def test_a_signal_reaches_the_life() -> None:
    process = run("return 0 if stop.wait(30) else 7")
    begun(process)
    process.send_signal(signal.SIGTERM)
    assert finished(process)["statuses"][0][:2] == ["0", "stopped"]


def test_the_end_of_the_input_stops_it_where_that_is_asked_for() -> None:
    process = run("return 0 if stop.wait(30) else 7", while_input=True)
    begun(process)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert finished(process)["statuses"][0][:2] == ["0", "stopped"]


def test_a_life_ends_with_the_process_that_began_it() -> None:
    with run("stop.wait(30)") as process:
        life, started = begun(process)
        process.kill()
        process.wait()
        assert gone([life])
        for pid in started:
            os.kill(int(pid), signal.SIGKILL)


def test_nothing_of_somebody_else_s_session_is_ended() -> None:
    if os.getsid(0) == os.getpid():
        pytest.skip("this process leads its session")
    with pytest.raises(UnavailableError, match="session"):
        end_others()
