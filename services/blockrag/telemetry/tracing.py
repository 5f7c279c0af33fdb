"""Telemetry switched on in a process, and spans whose parent is named by the RequestContext's ``traceparent``.

Ambient context (contextvars) would be wrong here: one coroutine of a service works on many requests, and batches
belong to none of them. So the context is data, like the tenant and the deadline beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from blockrag.settings import Settings
from blockrag.telemetry.logs import setup_logs
from blockrag.telemetry.trace_files import TENANT, TraceFileExporter, trace_directory
from blockrag.traceparent import TRACEPARENT
from blockrag.v1.common_pb2 import RequestContext

_OWN_PREFIX = "blockrag."
FLUSH_MS = 150
"""Finished spans wait this long at most: a process that is killed loses no more."""

_provider: TracerProvider | None = None
_tracer: trace.Tracer = trace.NoOpTracer()


def setup_telemetry(service: str, settings: Settings) -> None:
    """Starts this process's logs and traces under the name ``service``; a second call replaces the first.

    Spans go to the OTLP endpoint when one is set, and to files when ``telemetry.keep_traces``.
    """
    global _provider, _tracer
    shutdown_telemetry()
    setup_logs(service, settings.telemetry.log_level, settings.telemetry.audit)
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.namespace": "blockrag"}),
        sampler=ParentBased(TraceIdRatioBased(settings.telemetry.sampling_ratio)),
    )
    if settings.telemetry.keep_traces:
        files = TraceFileExporter(trace_directory(settings), service)
        provider.add_span_processor(BatchSpanProcessor(files, schedule_delay_millis=FLUSH_MS))
    if settings.telemetry.otlp_endpoint:
        # Imported here: it is heavy, and most processes do not export.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        endpoint = settings.telemetry.otlp_endpoint
        otlp = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        provider.add_span_processor(BatchSpanProcessor(otlp, schedule_delay_millis=FLUSH_MS))
    _provider = provider
    _tracer = provider.get_tracer("blockrag")


def shutdown_telemetry() -> None:
    """Writes out what is pending and stops tracing in this process."""
    global _provider, _tracer
    _tracer = trace.NoOpTracer()
    if _provider is not None:
        _provider.shutdown()
        _provider = None


class Span:
    """A span that runs, and the context to hand to whom this one calls."""

    def __init__(self, inner: trace.Span, context: RequestContext | None) -> None:
        self._inner = inner
        self._context = context

    @property
    def traceparent(self) -> str:
        """W3C trace context of this span; the caller's own where nothing is traced."""
        context = self._inner.get_span_context()
        if not context.is_valid:
            return self._context.traceparent if self._context is not None else ""
        return format_traceparent(context)

    def child_context(self) -> RequestContext:
        """The request's context with this span as the parent of what is called."""
        child = RequestContext()
        if self._context is not None:
            child.CopyFrom(self._context)
        child.traceparent = self.traceparent
        return child

    def set(self, **attributes: Any) -> None:
        """Adds attributes. Names without a dot get the prefix ``blockrag.``."""
        if self._inner.is_recording():
            self._inner.set_attributes(_named(attributes))

    def fail(self, message: str) -> None:
        """Marks the span as failed."""
        self._inner.set_status(Status(StatusCode.ERROR, message))


@contextmanager
def span(
    name: str, context: RequestContext | None, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: Any
) -> Iterator[Span]:
    """Runs the body inside a span that is a child of ``context.traceparent``, or a root without one.

    An exception marks the span as failed with its type and message, and passes on. Safe around ``yield`` in async
    generators.
    """
    parent = trace.set_span_in_context(
        NonRecordingSpan(parse_traceparent(context.traceparent if context is not None else "")),
        Context(),
    )
    inner = _tracer.start_span(name, context=parent, kind=kind, record_exception=False, set_status_on_exception=False)
    if inner.is_recording():
        if context is not None and context.request_id:
            inner.set_attribute("blockrag.request_id", context.request_id)
        if context is not None and context.tenant:  # by it a tenant is shown its own spans
            inner.set_attribute(TENANT, context.tenant)
        inner.set_attributes(_named(attributes))
    try:
        yield Span(inner, context)
    except (asyncio.CancelledError, GeneratorExit):
        inner.set_status(Status(StatusCode.ERROR, "cancelled"))
        raise
    except BaseException as error:
        inner.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {str(error)[:500]}"))
        inner.set_attribute("error.type", type(error).__name__)
        raise
    finally:
        inner.end()


def parse_traceparent(text: str) -> SpanContext:
    """The span that a W3C traceparent names; an invalid context when the text is none."""
    match = TRACEPARENT.match(text.strip().lower()) if text else None
    if match is None or match[1] == "ff":
        return trace.INVALID_SPAN_CONTEXT
    return SpanContext(int(match[2], 16), int(match[3], 16), is_remote=True, trace_flags=TraceFlags(int(match[4], 16)))


def format_traceparent(context: SpanContext) -> str:
    """W3C form of a span's context."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {(key if "." in key else _OWN_PREFIX + key): _plain(value) for key, value in attributes.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | bool | int | float) else str(value)
