"""Switches telemetry on in a process."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from blockrag.settings import Settings
from blockrag.telemetry.logs import setup_logs
from blockrag.telemetry.trace_files import TraceFileExporter, trace_directory
from blockrag.telemetry.tracing import use_tracer

FLUSH_MS = 150
"""Finished spans wait this long at most: a process that is killed loses no more."""

_provider: TracerProvider | None = None


def setup_telemetry(service: str, settings: Settings) -> None:
    """Starts this process's logs and traces under the name ``service``; a second call replaces the first.

    Spans go to the OTLP endpoint when one is set, and to files when ``telemetry.keep_traces``.
    """
    global _provider
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
    use_tracer(provider.get_tracer("blockrag"))


def shutdown_telemetry() -> None:
    """Writes out what is pending and stops tracing in this process."""
    global _provider
    use_tracer(trace.NoOpTracer())
    if _provider is not None:
        _provider.shutdown()
        _provider = None
