"""A process that has its work done by a child, and by another one where that says so or is killed.

For what Ray does not mend: without its GCS or raylet nothing of it goes on, and it takes a minute to say so. The
process keeps its id, so whoever started it or looks for it finds the system that comes; and a child has what the
process imported, so the next one begins without that.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from blockrag.errors import UnavailableError

AGAIN = 75
"""The exit status of a child that wants another one in its place; EX_TEMPFAIL of sysexits.h."""
_END_S = 10.0
_PR_SET_PDEATHSIG = 1


class Lives:
    """The children of this process, one after another. It may have no other thread, or they had one less."""

    def __init__(self, work: Callable[[], int], stop: threading.Event, *, while_input: bool = False) -> None:
        """``work`` runs in the children and returns their exit status. ``stop`` is set by this process's handlers of
        signals, which a child inherits: it is told by SIGTERM. With ``while_input`` the end of the standard input
        stops it too."""
        self._work = work
        self._stop = stop
        self._watched = [sys.stdin.fileno()] if while_input else []

    def one(self) -> int:
        """Runs one child to its end. Returns its exit status, or the negative number of the signal that it died of."""
        own = os.getpid()
        waking, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes)
        try:
            child = os.fork()
            if not child:
                signal.set_wakeup_fd(-1)
                os.close(waking)
                os.close(wakes)
                self._be_child(own)
            return self._wait(child, waking)
        finally:
            signal.set_wakeup_fd(-1)
            os.close(waking)
            os.close(wakes)

    def _be_child(self, parent: int) -> NoReturn:
        status = 1
        try:
            # As the kernel ends it when this process is killed, what it started notices that its parent is gone.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                status = self._work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # this process's cleaning up is not the child's

    def _wait(self, child: int, waking: int) -> int:
        told = False
        ended = os.pidfd_open(child)
        try:
            while True:
                if self._stop.is_set() and not told:
                    told = True
                    os.kill(child, signal.SIGTERM)
                ready = select.select([ended, waking, *self._watched], [], [])[0]
                if waking in ready:
                    os.read(waking, 64)
                for descriptor in [each for each in self._watched if each in ready]:
                    if not os.read(descriptor, 1024):
                        self._watched.remove(descriptor)
                        self._stop.set()
                if ended in ready:
                    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os.close(ended)


def end_others(spared: Collection[int] = ()) -> None:
    """Kills all processes of this one's session, which it must lead, but those spared, and waits for their end.

    Whose parent died is in the session still. Raises ``UnavailableError`` where the session is somebody else's, a
    shell's say, or a process does not end.
    """
    own = os.getpid()
    if os.getsid(0) != own:
        raise UnavailableError("this process does not lead its session: what it started cannot be told from others")
    until = time.monotonic() + _END_S
    while others := [pid for pid in _of_session(own) if pid != own and pid not in spared]:
        if time.monotonic() > until:
            raise UnavailableError(f"processes {', '.join(map(str, others))} do not end")
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, of, *_ = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(of) == session and state not in "ZX":
                found.append(int(entry.name))
    return found
