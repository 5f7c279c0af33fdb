"""The process that holds the embedded index; ``main`` is its whole life.

Requests and answers are pickled over an inherited socket, one after another. The socket closes when the replica
dies, however it dies; then the worker makes everything durable and ends, so that the next replica finds the
directory free.
"""

from __future__ import annotations

import logging
import pickle
import select
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockrag.errors import BlockragError, UnavailableError
from blockrag.retriever.edge_store import EdgeStore

_logger = logging.getLogger(__name__)

HEADER_BYTES = 8
"""Length of a message, little-endian, in front of it."""
_IDLE_S = 0.5


Opening = Callable[[], EdgeStore]
"""First message: opens the store."""
Call = Callable[[EdgeStore], Any]
"""Each further one: calls a method of the store."""


@dataclass(frozen=True)
class Answer:
    """What the call returned or raised."""

    value: Any = None
    error: BlockragError | None = None


def frame(message: object) -> bytes:
    """A message as it goes over the socket."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(HEADER_BYTES, "little") + data


def serve(connection: socket.socket) -> None:
    """Answers calls until the other side closes."""
    opening = _receive(connection)
    if opening is None:
        return
    try:
        store = opening()
    except Exception as error:
        connection.sendall(frame(Answer(error=_as_own_error(error))))
        return
    connection.sendall(frame(Answer()))
    try:
        wait_s: float | None = _IDLE_S
        while wait_s is not None:
            wait_s = _answer_next(connection, store, wait_s)
    finally:
        store.close()


def _answer_next(connection: socket.socket, store: EdgeStore, wait_s: float) -> float | None:
    """How long to wait for the next call; None: there is none."""
    ready = select.select([connection], [], [], wait_s)[0]
    if ready:
        call = _receive(connection)
        if call is None:
            return None
        try:
            answer = Answer(call(store))
        except Exception as error:
            answer = Answer(error=_as_own_error(error))
        try:
            connection.sendall(frame(answer))
        except OSError:
            return None
    try:
        return 0.0 if store.tidy(idle=not ready) else _IDLE_S
    except Exception:
        _logger.exception("the vector index could not be flushed or optimized")
        return _IDLE_S


def _receive(connection: socket.socket) -> Any:
    header = _read(connection, HEADER_BYTES)
    data = _read(connection, int.from_bytes(header, "little")) if header else None
    return pickle.loads(data) if data else None


def _read(connection: socket.socket, size: int) -> bytes | None:
    try:
        data = connection.recv(size, socket.MSG_WAITALL)
    except OSError:
        return None
    return data if len(data) == size else None


def _as_own_error(error: Exception) -> BlockragError:
    if isinstance(error, BlockragError):
        return error
    _logger.error("the vector index failed", exc_info=error)
    return UnavailableError(f"the vector index failed: {str(error)[:500] or type(error).__name__}")


def main() -> None:
    """Serves the socket whose descriptor is the argument. Not run as ``__main__``: its classes would not unpickle."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited)
