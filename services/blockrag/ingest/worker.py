"""A process that parses one file after another, for ``parser_pool``.

Its input and output are a Unix socket, its first argument, and the files whose descriptors come with each request. It
limits its own memory, and an alarm ends it where the one who should is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import MediaType
from blockrag.ingest.parsing import parse

MAX_REQUEST_BYTES = 1 << 16
_GRACE_S = 5


def main(descriptor: int, timeout_s: float, memory_mb: int) -> None:
    """Answers requests until the other side closes the socket."""
    # What damaged files make pypdf say would fill a log.
    logging.disable(logging.CRITICAL)
    _limit_memory(memory_mb)
    with socket.socket(fileno=descriptor) as connection:
        connection.sendall(b"{}\n")
        while True:
            # The descriptors come with the first bytes.
            data, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 2)
            while data and not data.endswith(b"\n"):  # the kernel cuts what is long
                more = connection.recv(MAX_REQUEST_BYTES)
                data = data + more if more else b""
            if not data:
                return
            signal.alarm(int(timeout_s) + _GRACE_S)
            with open(descriptors[0], "rb") as source, open(descriptors[1], "wb") as target:  # noqa: PTH123
                answer = _answer(source, target, json.loads(data))
            signal.alarm(0)
            connection.sendall(json.dumps(answer).encode() + b"\n")
            if answer.get("ended"):
                return


def _answer(source: BinaryIO, target: BinaryIO, request: dict[str, Any]) -> dict[str, Any]:
    try:
        parsed = parse(source, target, MediaType(request["media_type"]), request["metadata"])
    except InvalidRequestError as error:
        return {"field": error.field, "problem": error.problem}
    except (MemoryError, RecursionError, OSError) as error:
        # What a failed allocation left behind is not known: begin anew.
        return {"ended": type(error).__name__}
    return asdict(parsed)


def _limit_memory(memory_mb: int) -> None:
    """At most so much beyond what the process takes by itself, and so much text: a small pdf can hold gigabytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory_mb << 20,) * 2)
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
            taken = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + (memory_mb << 20),) * 2)
    except (OSError, ValueError):
        # Not Linux: the limit is of data only.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20,) * 2)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
