"""What every call of the client has: a span of its own, and errors as ``blockrag.errors``."""

from __future__ import annotations

import asyncio
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
