"""The W3C trace context as text. Imports nothing of blockrag, so that clients stay light."""

from __future__ import annotations

import re
import secrets
from typing import Any

_TRACEPARENT = re.compile(r"^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")
"""Version, trace id, span id, flags."""


def new_traceparent(*, sampled: bool = True) -> str:
    """The context of a new trace, for callers without a tracer of their own."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{'01' if sampled else '00'}"


def format_traceparent(context: Any) -> str:
    """The context of a span, an OpenTelemetry ``SpanContext``."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def trace_id_of(traceparent: str) -> str:
    """The trace's id in 32 hex digits; empty when the text is no traceparent."""
    match = _TRACEPARENT.match(traceparent)
    return match[2] if match else ""


def span_id_of(traceparent: str) -> str:
    """The span's id in 16 hex digits; empty when the text is no traceparent."""
    match = _TRACEPARENT.match(traceparent)
    return match[3] if match else ""
