"""Traces, logs and metrics. Nothing here imports Ray until a metric is recorded inside of it."""

from blockrag.telemetry import metrics
from blockrag.telemetry.logs import request_fields
from blockrag.telemetry.tracing import Span, read_trace, setup_telemetry, shutdown_telemetry, span, trace_directory
from blockrag.traceparent import new_traceparent, trace_id_of

__all__ = [
    "Span",
    "metrics",
    "new_traceparent",
    "read_trace",
    "request_fields",
    "setup_telemetry",
    "shutdown_telemetry",
    "span",
    "trace_directory",
    "trace_id_of",
]
