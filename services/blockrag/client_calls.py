"""What every call of the client has: a span of its own, and errors as ``blockrag.errors``."""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from blockrag.errors import (
    BlockragError,
    DataError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    SetupError,
    UnauthenticatedError,
    UnavailableError,
)
from blockrag.results import TraceSpan
from blockrag.traceparent import new_traceparent, span_id_of, trace_id_of

_FIELD = re.compile(r"^([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): (.*)$", re.DOTALL)
_RETRY = re.compile(r"^(.*); retry in (\d+) ms$", re.DOTALL)
_DEFAULT_RETRY_MS = 250
_MESSAGE_BYTES = 64 * 2**20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# What clients of gRPC make of a proxy or a server that went away in the middle of a call.
_GONE = re.compile(r"^(Received RST_STREAM|Received http2 header with status: 5|Stream removed|Socket closed)")
_BROKEN_WRITE = "Internal error from Core"  # what grpc.aio makes of a write on a call that is over
_PLAIN: dict[grpc.StatusCode, type[BlockragError]] = {
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.DATA_LOSS: DataError,
    grpc.StatusCode.FAILED_PRECONDITION: SetupError,
}


@dataclass(frozen=True)
class CallSpan:
    """A call as this client saw it."""

    trace_id: str
    span: TraceSpan


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A connection that belongs to the running event loop; without credentials it is not encrypted."""
    options = [
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


class Patience:
    """How long a call is tried again when what worked on it went away, and with which pauses.

    ::

        while True:
            try:
                return await call(timeout=patience.left_s)
            except UnavailableError as error:
                await patience.pause(error)
    """

    def __init__(self, patience_s: float, timeout_s: float) -> None:
        """``patience_s`` from the first failure, ``timeout_s`` from now."""
        self._patience_s = patience_s
        self._until = time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S
        self.failed = False

    @property
    def left_s(self) -> float:
        """Seconds until the call's time is up."""
        return max(self._until - time.monotonic(), 0.001)

    async def pause(self, error: UnavailableError) -> None:
        """Waits before the next try, longer each time; raises ``error`` when there is no time for another."""
        now = time.monotonic()
        if not self.failed:
            self.failed = True
            self._until = min(self._until, now + self._patience_s)
        # Not all together: those who lost the same replica would meet at the next one.
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if now + pause_s >= self._until:
            raise error
        await asyncio.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


@contextmanager
def start_call(method: str, kept: deque[CallSpan]) -> Iterator[str]:
    """Runs a call inside of a span that is kept in ``kept``; gives its ``traceparent``.

    The span belongs to the caller's trace where the caller uses OpenTelemetry, else it starts one.
    """
    name = f"client {method}"
    inner = _caller_span(name)
    traceparent = _traceparent_of(inner) or new_traceparent()
    started = time.time_ns()
    error = ""
    try:
        yield traceparent
    except (asyncio.CancelledError, GeneratorExit):
        error = "cancelled"
        raise
    except Exception as failure:
        error = f"{type(failure).__name__}: {str(failure)[:500]}"
        raise
    finally:
        if inner is not None:
            inner.end()
        span = TraceSpan(span_id_of(traceparent), "", name, "client", started, time.time_ns(), {}, error)
        kept.append(CallSpan(trace_id_of(traceparent), span))


@contextmanager
def translated() -> Iterator[None]:
    """Turns gRPC's errors into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error.code(), error.details() or "") from error


def error_of(code: grpc.StatusCode, details: str) -> BlockragError:
    """The error that a status stands for: the reverse of ``blockrag.status``."""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        found = _FIELD.match(details)
        return InvalidRequestError(found[1], found[2]) if found else PromptTooLongError(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        found = _RETRY.match(details)
        return OverloadedError(found[1], int(found[2])) if found else OverloadedError(details, _DEFAULT_RETRY_MS)
    if code is grpc.StatusCode.NOT_FOUND:
        # Serve says the same of an application that is not there (yet).
        gone = details.startswith("Application ")
        return UnavailableError(f"the gateway is not deployed: {details}") if gone else NotFoundError(details)
    if code is grpc.StatusCode.INTERNAL and details == _BROKEN_WRITE:
        return UnavailableError("the server refused or lost the upload before all of it was sent")
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and _GONE.match(details):
        return UnavailableError(f"the connection was lost in the middle of the call ({details[:100]})")
    kind = _PLAIN.get(code)
    return kind(details) if kind is not None else BlockragError(f"{code.name}: {details}")


def _caller_span(name: str) -> Any:
    # Looked up, not imported: who uses OpenTelemetry has imported it.
    trace = sys.modules.get("opentelemetry.trace")
    return trace.get_tracer("blockrag.client").start_span(name, kind=trace.SpanKind.CLIENT) if trace else None


def _traceparent_of(span: Any) -> str:
    context = span.get_span_context() if span is not None else None
    if context is None or not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
