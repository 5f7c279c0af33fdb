"""What every call of the client has: a span of its own, and errors as ``blockrag.errors``."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from blockrag.errors import OverloadedError, UnavailableError
from blockrag.results import TraceSpan
from blockrag.status import error_of
from blockrag.traceparent import format_traceparent, new_traceparent, span_id_of, trace_id_of

_MESSAGE_BYTES = 64 * 2**20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


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
        self._until = self._last_try = time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S
        self.failed = False

    @property
    def left_s(self) -> float:
        """Seconds until the call's time is up."""
        return max(self._until - time.monotonic(), 0.001)

    async def pause(self, error: UnavailableError | OverloadedError) -> None:
        """Waits before the next try, longer each time and as long as a refusal says; raises ``error`` when there is no
        time for another."""
        now = time.monotonic()
        if not self.failed:
            self.failed = True
            # When it is sent, not how long its answer may take: that is what the caller said.
            self._last_try = min(self._until, now + self._patience_s)
        # Not all together: those who lost the same replica would meet at the next one.
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if isinstance(error, OverloadedError):
            pause_s += error.retry_after_ms / 1000
        if now + pause_s >= self._last_try:
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
    context = inner.get_span_context() if inner is not None else None
    traceparent = format_traceparent(context) if context is not None and context.is_valid else new_traceparent()
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


def _caller_span(name: str) -> Any:
    # Looked up, not imported: who uses OpenTelemetry has imported it.
    trace = sys.modules.get("opentelemetry.trace")
    return trace.get_tracer("blockrag.client").start_span(name, kind=trace.SpanKind.CLIENT) if trace else None
