"""Logs carry the request's ids; metrics are silent outside Ray."""

from __future__ import annotations

import json
import logging

import grpc
import pytest
from ray.serve._private.grpc_util import get_grpc_response_status
from ray.serve.exceptions import gRPCStatusError

from blockrag.errors import OverloadedError
from blockrag.telemetry import metrics, new_traceparent, request_fields, trace_id_of
from blockrag.telemetry.logs import JsonFormatter, untold
from blockrag.v1.common_pb2 import RequestContext


class Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, str]] = []
        self.setFormatter(JsonFormatter("gateway"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


def test_a_line_is_json_with_the_requests_ids() -> None:
    traceparent = new_traceparent()
    handler = Collecting()
    logger = logging.getLogger("blockrag.test.logs")
    logger.addHandler(handler)
    fields = request_fields(RequestContext(request_id="r1", tenant="acme", traceparent=traceparent))
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logger.exception("broken: %s", "ä\n", extra=fields)
    logger.removeHandler(handler)
    (line,) = handler.lines
    assert line["message"] == "broken: ä\n"
    assert line["level"] == "ERROR"
    assert line["service"] == "gateway"
    assert line["request_id"] == "r1"
    assert line["tenant"] == "acme"
    assert line["trace_id"] == trace_id_of(traceparent)
    assert "ZeroDivisionError" in line["exception"]


def test_without_a_request_there_are_no_ids() -> None:
    handler = Collecting()
    logger = logging.getLogger("blockrag.test.other")
    logger.addHandler(handler)
    logger.warning("hello")
    logger.removeHandler(handler)
    assert "request_id" not in handler.lines[0]


def test_metrics_do_nothing_outside_ray() -> None:
    metrics.TIME_TO_FIRST_TOKEN_SECONDS.observe(0.02, attention_mode="block")
    metrics.KV_CACHE_HIT_TOKENS.inc(5, tier="l1")
    metrics.NUM_REQUESTS_RUNNING.set(1, service="decoder")
    used = (metrics.TIME_TO_FIRST_TOKEN_SECONDS, metrics.KV_CACHE_HIT_TOKENS, metrics.NUM_REQUESTS_RUNNING)
    assert [metric._inner for metric in used] == [None, None, None]


def test_serve_writes_no_traceback_of_a_call_that_ends_with_an_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    serve = logging.getLogger("ray.serve")
    serve.addFilter(untold)
    told = []
    try:
        for error in (OverloadedError("full", 100), ValueError("a fault")):
            caplog.clear()
            try:
                raise error
            except Exception:
                serve.exception("Request failed.")
            status = gRPCStatusError(error, code=grpc.StatusCode.RESOURCE_EXHAUSTED, details="full")
            try:
                raise status
            except gRPCStatusError:
                assert get_grpc_response_status(status, 1.0, "r").code is grpc.StatusCode.RESOURCE_EXHAUSTED
            told.append(len(caplog.records))
    finally:
        serve.removeFilter(untold)
    assert told == [0, 2]
