"""Telemetry switched on in a process, and spans whose parent is named by the RequestContext's ``traceparent``.

Ambient context (contextvars) would be wrong here: one coroutine of a service works on many requests, and batches
belong to none of them. So the context is data, like the tenant and the deadline beside it.

Finished spans are kept as JSON lines in files, so that a trace can be shown without a collector: each process appends
to a file of its own and starts a new one past a size; the directory as a whole is bounded by deleting the oldest files.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from blockrag.results import TraceSpan
from blockrag.settings import Settings
from blockrag.telemetry.logs import setup_logs
from blockrag.traceparent import format_traceparent
from blockrag.v1.common_pb2 import RequestContext

TENANT = "blockrag.tenant"
"""Attribute that says whose a span is."""
FILE_BYTES = 4 * 2**20
DIRECTORY_BYTES = 48 * 2**20


@dataclass(frozen=True)
class StoredSpan(TraceSpan):
    """One finished span, as kept in files."""

    trace_id: str = ""


def trace_directory(settings: Settings) -> Path:
    """Where this node's processes keep their spans."""
    return settings.state_path / "traces"


class TraceFileExporter(SpanExporter):
    """Appends spans to ``directory/<service>-<pid>-<n>.jsonl``."""

    def __init__(
        self, directory: Path, service: str, *, file_bytes: int = FILE_BYTES, directory_bytes: int = DIRECTORY_BYTES
    ) -> None:
        self._directory = directory
        self._service = service
        self._file_bytes = file_bytes
        self._directory_bytes = directory_bytes
        self._lock = threading.Lock()
        self._number = 0
        directory.mkdir(parents=True, exist_ok=True)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes the spans; FAILURE when the disk refuses, which loses spans and nothing else."""
        lines = b"".join(_line(span, self._service) for span in spans)
        try:
            with self._lock:
                path = self._path()
                if path.exists() and path.stat().st_size + len(lines) > self._file_bytes:
                    self._number += 1
                    path = self._path()
                    _trim(self._directory, self._directory_bytes)
                # One write of whole lines: a reader never sees half of a batch's last line for long.
                with path.open("ab", buffering=0) as file:
                    file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _path(self) -> Path:
        return self._directory / f"{self._service}-{os.getpid()}-{self._number}.jsonl"


def read_trace(directory: Path, trace_id: str, tenant: str | None = None) -> list[StoredSpan]:
    """All spans of a trace (32 hex digits) in a directory, in order of their start; empty when there are none.

    ``tenant``: only those that name it. It takes as long whether others' spans are there or not.
    """
    wanted = trace_id.strip().lower()
    owner = b"" if tenant is None else b'"' + TENANT.encode() + b'":"' + tenant.encode() + b'"'
    found: list[StoredSpan] = []
    for path in directory.glob("*.jsonl"):
        try:
            content = path.read_bytes()
        except OSError:  # deleted by the rotation meanwhile
            continue
        for line in _lines_with(content, wanted.encode()):
            if owner not in line:
                continue
            try:
                stored = StoredSpan(**json.loads(line))
            except (ValueError, TypeError):  # the last line while it is being written
                continue
            if stored.trace_id == wanted and tenant in (None, stored.attributes.get(TENANT)):
                found.append(stored)
    return sorted(found, key=lambda stored: (stored.start_unix_ns, stored.end_unix_ns))


def _lines_with(content: bytes, wanted: bytes) -> Iterator[bytes]:
    end = 0
    while wanted and (place := content.find(wanted, end)) >= 0:
        start, end = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place)
        end = len(content) if end < 0 else end
        yield content[start:end]


def _line(span: ReadableSpan, service: str) -> bytes:
    context = span.context
    parent = span.parent
    failed = span.status.status_code is StatusCode.ERROR
    stored = StoredSpan(
        trace_id=f"{context.trace_id:032x}" if context else "",
        span_id=f"{context.span_id:016x}" if context else "",
        parent_span_id=f"{parent.span_id:016x}" if parent is not None else "",
        name=span.name,
        service=service,
        start_unix_ns=span.start_time or 0,
        end_unix_ns=span.end_time or 0,
        attributes={key: _text(value) for key, value in (span.attributes or {}).items()},
        error=(span.status.description or "failed") if failed else "",
    )
    return json.dumps(asdict(stored), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _trim(directory: Path, most_bytes: int) -> None:
    files = []
    for path in directory.glob("*.jsonl"):
        try:
            status = path.stat()
        except OSError:
            continue
        files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


_OWN_PREFIX = "blockrag."
FLUSH_MS = 150
"""Finished spans wait this long at most: a process that is killed loses no more."""

_W3C = TraceContextTextMapPropagator()
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
    named = context.traceparent.strip().lower() if context is not None else ""
    parent = _W3C.extract({"traceparent": named}, Context())
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


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {(key if "." in key else _OWN_PREFIX + key): _plain(value) for key, value in attributes.items()}


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | bool | int | float) else str(value)
