"""Ray's workers as copies of one process, the origin, which has imported what they need.

A worker of Ray imports Ray, Serve and its service before it does anything: two to six seconds of a core and a hundred
megabytes and more, in each of a dozen processes. The origin imports all of it once. It connects to nothing and starts
no thread, so that a copy of it (fork) is what a new interpreter would be after its imports (``inert.py``), and shares
its memory until one of them writes to it.

Ray starts every Python process by ``sys.executable``. While it reads that (``launched_by``) it is ``launch.py``, which
hands Ray's workers to the origin. Where that does not answer they are started as Ray would, so nothing depends on its
life; a worker that runs does not either.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blockrag.local import launch
from blockrag.local.haproxy import write_script

_REQUEST_S = 10.0
"""How long the origin waits for a request that has begun; whoever sends it is on this machine."""
_LONGEST_REQUEST = 2**20
_OOM_SCORE = "1000"
"""As Ray sets it for a worker that it starts itself, so that a machine without memory ends workers first."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a copy becomes."""

    arguments: list[str]
    """A Python file and what it is given."""
    environment: dict[str, str]
    folder: str
    descriptors: tuple[int, ...]
    """Standard input, output and error."""


@dataclass(frozen=True)
class Origin:
    """The origin as its owner sees it."""

    pid: int
    _lifeline: int
    """The origin ends when this is closed, however its owner ends."""

    def stop(self) -> None:
        """Ends it and waits for that. Copies go on."""
        os.close(self._lifeline)
        os.waitpid(self.pid, 0)


def start_origin(address: Path, prepare: Callable[[], None]) -> Origin | Job:
    """Forks the origin, which listens at ``address``. The caller must have no other thread.

    ``prepare`` imports, in the origin; where it raises there will be none. Returns more than once: the origin to its
    owner, and in each copy the job that it is for, to be given to ``work``.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(address))
    listener.listen(128)  # who connects waits here while the origin imports
    end, lifeline = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(end)
        listener.close()
        return Origin(pid, lifeline)
    os.close(lifeline)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no copy stays behind as a zombie
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        prepare()
        # What is there now is never looked at by a copy's collector, which would write to all of it.
        gc.collect()
        gc.freeze()
        return _copy_when_asked(listener, end)
    except Exception:
        _logger.exception("workers start without the origin")
        os._exit(1)


def work(job: Job) -> None:
    """Becomes what the job says; for the calling process there is no way back."""
    for number, descriptor in enumerate(job.descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends a worker's children with its group
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(job.environment)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own generator does so by itself
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # what Ray's OMP_NUM_THREADS says, which torch reads when it is imported
    sys.argv = list(job.arguments)
    runpy.run_path(job.arguments[0], run_name="__main__")


@contextmanager
def launched_by(launcher: Path) -> Iterator[None]:
    """Inside, ``sys.executable`` is ``launcher``."""
    python = sys.executable
    sys.executable = str(launcher)
    try:
        yield
    finally:
        sys.executable = python


def write_launcher(folder: Path, address: Path) -> Path:
    """The executable that stands for Python: ``launch.py`` with the origin's ``address``."""
    return write_script(folder / "python", launch.__file__, address, sys.executable)


def _copy_when_asked(listener: socket.socket, end: int) -> Job:
    """Forks for every request; returns in the copies only. Ends when ``end`` can be read."""
    while True:
        ready, _, _ = select.select([listener.fileno(), end], [], [])
        if end in ready:
            os._exit(0)
        connection, _ = listener.accept()
        with connection:
            try:
                job = _read_job(connection)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _logger.warning("a request for a worker is passed over: %s", error)
                continue
            try:
                copy = os.fork()
            except OSError as error:
                _logger.warning("no copy for a worker: %s", error)
            else:
                if not copy:
                    listener.close()
                    os.close(end)
                    return job
                with suppress(OSError):
                    connection.sendall(b"\1")
        for descriptor in job.descriptors:
            os.close(descriptor)


def _read_job(connection: socket.socket) -> Job:
    connection.settimeout(_REQUEST_S)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    try:
        text = bytearray()
        while part := connection.recv(65536):
            text += part
            if len(text) > _LONGEST_REQUEST:
                raise ValueError("it has no end")
        request = json.loads(text)
        if len(descriptors) != 3:
            raise ValueError(f"{len(descriptors)} descriptors")
        return Job([*request["arguments"]], {**request["environment"]}, str(request["folder"]), tuple(descriptors))
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
