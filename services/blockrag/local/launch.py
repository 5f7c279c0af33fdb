"""What Ray runs where it would run Python: its workers become copies of the origin, everything else Python itself.

Run by its path in an interpreter without site packages (``copies.write_launcher``): it imports only what Python brings,
so that it is over before another interpreter would have looked for its packages.
"""

from __future__ import annotations

import json
import os
import socket
import sys

WORKER_FILE = "ray/_private/workers/default_worker.py"
"""How the path of the file ends that a worker of Ray runs."""
JOB_ID = "01000000"
"""Ray's first job, that of the process which starts it; the origin is for workers of that one."""
_WAIT_S = 60.0
"""For the origin, which may still be importing; a busy machine takes its time."""


def main(address: str, python: str, arguments: list[str]) -> None:
    """``address``: the origin's socket; ``python``: the interpreter; ``arguments``: what it would be given."""
    of_ours = bool(arguments) and arguments[0].endswith(WORKER_FILE) and os.environ.get("RAY_JOB_ID") == JOB_ID
    if not (of_ours and hand_over(address, arguments)):
        os.execv(python, [python, *arguments])


def hand_over(address: str, arguments: list[str]) -> bool:
    """Whether the origin has made a copy of itself for ``arguments``, with this process's descriptors and place."""
    folder = os.getcwd()  # noqa: PTH109 (importing pathlib takes as long as the rest)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": folder}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_WAIT_S)
            connection.connect(address)
            socket.send_fds(connection, [b"\0"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == b"\1"
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
