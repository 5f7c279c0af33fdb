"""Beginning again: everything that this process started is ended, and the process becomes its own program once more.

For what Ray does not mend: without its GCS or raylet nothing of it goes on, and it takes a minute to say so. The
process keeps its id, so whoever started it or looks for it finds the system that comes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from blockrag.errors import UnavailableError

_END_S = 10.0


def end_others() -> None:
    """Kills all processes of this one's session, which it must lead, and waits for their end.

    Whose parent died is in the session still. Raises ``UnavailableError`` where the session is somebody else's, a
    shell's say, or a process does not end.
    """
    own = os.getpid()
    if os.getsid(0) != own:
        raise UnavailableError("this process does not lead its session: what it started cannot be told from others")
    until = time.monotonic() + _END_S
    while others := [pid for pid in _of_session(own) if pid != own]:
        if time.monotonic() > until:
            raise UnavailableError(f"processes {', '.join(map(str, others))} do not end")
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.02)
    _reap()


def become(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs a module of Python's in this process, which keeps its id and its standard streams. Does not return."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        if (descriptor := int(entry.name)) > 2:
            with suppress(OSError):  # that of the listing is closed
                os.set_inheritable(descriptor, False)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], dict(environment))


def _of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, of, *_ = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(of) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
