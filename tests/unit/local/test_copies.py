"""Copies of a process that has imported everything, in place of new interpreters."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockrag.local.launch import JOB_ID

_OWNER = """
import functools, importlib, os, sys
from pathlib import Path
from blockrag.local.copies import Job, start_origin, work, write_launcher
folder, module = Path(sys.argv[1]), sys.argv[2]
made = start_origin(folder / "w", functools.partial(importlib.import_module, module))
if isinstance(made, Job):
    work(made)
    sys.exit(0)
print(write_launcher(folder, folder / "w"), made.pid, flush=True)
sys.stdin.read()
made.stop()
print("stopped", flush=True)
"""
_WORKER = """
import json, os, sys, signal
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "name": __name__, "arguments": sys.argv,
    "folder": os.getcwd(), "given": os.environ.get("GIVEN"), "inherited": os.environ.get("INHERITED"),
    "imported": "colorsys" in sys.modules, "stdin": sys.stdin.read(),
    "children": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
}))
"""
_DEADLINE_S = 30.0


class Owner:
    """A process with an origin."""

    def __init__(self, folder: Path, module: str = "colorsys") -> None:
        self.folder = folder
        self.job = JOB_ID
        self.worker = folder / "ray" / "_private" / "workers" / "default_worker.py"
        self.worker.parent.mkdir(parents=True)
        self.worker.write_text(_WORKER)
        environment = {**os.environ, "INHERITED": "by the origin"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWNER, str(folder), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        launcher, _, pid = self.process.stdout.readline().strip().rpartition(" ")
        self.launcher, self.origin = launcher, int(pid)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """What Ray would run, with ``sys.executable`` in front."""
        environment = {**os.environ, "GIVEN": "for the worker", "RAY_JOB_ID": self.job}
        environment.pop("INHERITED", None)
        return subprocess.run(
            [self.launcher, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder / "ray",
            env=environment,
            timeout=60,
            check=False,
        )

    def work(self, *arguments: str, stdin: str = "") -> dict[str, Any]:
        """What a worker says of itself."""
        done = self.run(str(self.worker), *arguments, stdin=stdin)
        assert not done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    made = Owner(tmp_path)
    yield made
    made.end()


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _DEADLINE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_worker_is_a_copy_of_the_origin(owner: Owner) -> None:
    said = owner.work("--one=1", "two words", stdin="what it reads")
    assert said["parent"] == owner.origin
    assert said["imported"]  # which the worker's file does not
    assert said["name"] == "__main__"
    assert said["arguments"] == [str(owner.worker), "--one=1", "two words"]
    assert said["folder"] == str(owner.folder / "ray")
    assert (said["given"], said["inherited"]) == ("for the worker", None)
    assert said["stdin"] == "what it reads"
    assert said["group"] == said["pid"]
    assert said["children"]
    assert eventually(lambda: not runs(said["pid"]))  # no zombie
    assert owner.work()["pid"] != said["pid"]


def test_everything_else_is_run_by_python(owner: Owner) -> None:
    done = owner.run("-c", "import os, sys; print(os.getppid(), 'colorsys' in sys.modules); sys.exit(3)")
    assert done.returncode == 3
    assert done.stdout.split() == [str(os.getpid()), "False"]


def test_a_worker_that_fails_says_so_and_harms_no_other(owner: Owner) -> None:
    owner.worker.write_text("import sys\nassert sys.argv[1:] == []\nraise RuntimeError('no worker')\n")
    done = owner.run(str(owner.worker))
    assert "RuntimeError: no worker" in done.stderr
    owner.worker.write_text(_WORKER)
    assert owner.work()["parent"] == owner.origin


def test_workers_of_another_job_start_by_themselves(owner: Owner) -> None:
    owner.job = "02000000"
    assert owner.work()["parent"] == os.getpid()


@pytest.mark.parametrize("request_", [b"", b"\0", b"\0{", b"\0" + b'{"arguments": 1}', b"\0" + b" " * (2**20 + 2)])
def test_what_is_no_request_is_passed_over(request_: bytes, owner: Owner) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(owner.folder / "w"))
        try:
            connection.sendall(request_)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert owner.work()["parent"] == owner.origin


def test_without_an_origin_a_worker_starts_by_itself(owner: Owner) -> None:
    os.kill(owner.origin, signal.SIGKILL)
    assert eventually(lambda: Path(f"/proc/{owner.origin}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    said = owner.work("--one=1")
    assert said["parent"] == os.getpid()
    assert not said["imported"]
    assert said["arguments"] == [str(owner.worker), "--one=1"]


def test_an_origin_that_cannot_import_ends(tmp_path: Path) -> None:
    owner = Owner(tmp_path, module="no_such_module")
    try:
        assert owner.work()["parent"] == os.getpid()
    finally:
        owner.end()


@pytest.mark.parametrize("how", ["stops", "is killed"])
def test_the_origin_ends_with_its_owner_and_copies_go_on(how: str, owner: Owner) -> None:
    owner.worker.write_text("import os, sys\nprint(os.getpid(), flush=True)\nsys.stdin.read()\n")
    with subprocess.Popen(
        [owner.launcher, str(owner.worker)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_JOB_ID": JOB_ID},
    ) as launched:
        assert launched.stdout is not None
        worker = int(launched.stdout.readline())
        if how == "stops":
            output, _ = owner.process.communicate()
            assert output == "stopped\n"
            assert not runs(owner.origin)
        else:
            owner.end()
            assert eventually(lambda: not runs(owner.origin))
        assert runs(worker)
    assert eventually(lambda: not runs(worker))
