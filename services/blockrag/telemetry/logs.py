"""Structured logs: one JSON object per line, with the request's id and its trace's where there is a request."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from blockrag.errors import BlockragError
from blockrag.traceparent import trace_id_of
from blockrag.v1.common_pb2 import RequestContext

_FIELDS = ("request_id", "trace_id", "tenant", "method", "status", "milliseconds")
AUDIT = "blockrag.audit"
"""The logger of calls from outside."""
_SERVE = "ray.serve"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for field in _FIELDS:
            value = getattr(record, field, "")
            if value != "":
                line[field] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def request_fields(context: RequestContext) -> dict[str, str]:
    """What a line about one request has as ``extra``."""
    return {
        "request_id": context.request_id,
        "trace_id": trace_id_of(context.traceparent),
        "tenant": context.tenant,
    }


def setup_logs(service: str, level: str, audit: bool) -> None:
    """Sends this package's records to standard error as JSON; replaces what an earlier call set up.

    ``audit``: calls from outside have a line each, whatever the level.
    """
    calls = logging.getLogger(AUDIT)
    calls.setLevel("INFO")
    calls.disabled = not audit
    logger = logging.getLogger("blockrag")
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, JsonFormatter):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    serve = logging.getLogger(_SERVE)
    if untold not in serve.filters:
        serve.addFilter(untold)


def untold(record: logging.LogRecord) -> bool:
    """Leaves out Serve's tracebacks, two for each, of calls that end with an error of ours.

    A refusal is no fault of the server's, and writing them took more time than the rest of it. What nobody foresaw is
    logged where it is translated.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(getattr(error, "original_exception", error), BlockragError)
