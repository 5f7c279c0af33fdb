"""Traces, logs and metrics. Nothing here imports Ray until a metric is recorded inside of it."""

from blockrag.telemetry import metrics
from blockrag.telemetry.logs import request_fields
from blockrag.telemetry.trace_files import read_trace, trace_directory
from blockrag.telemetry.tracing import Span, setup_telemetry, shutdown_telemetry, span
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
