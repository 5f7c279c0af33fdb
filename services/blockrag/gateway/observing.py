"""What every call leaves behind: a span and metrics; and what it starts with: its context."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.trace import SpanKind

from blockrag.errors import OverloadedError
from blockrag.grpc_status import as_known_error, status_name
from blockrag.telemetry import Span, metrics, span
from blockrag.v1.common_pb2 import AttentionMode, RequestContext
from blockrag.v1.rag_pb2 import Completion

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_context(call: Any, tenant: str) -> RequestContext:
    """A call's context, by Serve's: the client's request id and ``traceparent`` where it sent usable ones."""
    sent = {} if call is None else {key: value for key, value in call.invocation_metadata() if isinstance(value, str)}
    # Serve makes an id for calls without one and puts it into the trailing metadata: use the same.
    made = dict(call.trailing_metadata()) if call is not None else {}
    request_id = sent.get("request_id") or made.get("request_id") or ""
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        request_id = str(uuid.uuid4())
    return RequestContext(
        request_id=request_id,
        tenant=tenant,
        traceparent=sent.get("traceparent", ""),
    )


@contextmanager
def observed(service: str, method: str, context: RequestContext) -> Iterator[Span]:
    """Runs a call inside of its server span and counts it."""
    started = time.perf_counter()
    status = "OK"
    with span(
        f"blockrag.v1.{service}/{method}",
        context,
        kind=SpanKind.SERVER,
        tenant=context.tenant,
        **{"rpc.system.name": "grpc", "rpc.method": f"blockrag.v1.{service}/{method}"},
    ) as current:
        try:
            yield current
        except BaseException as error:
            status = status_name(error)
            if isinstance(as_known_error(error), OverloadedError):
                metrics.ADMISSION_REJECTIONS.inc(method=method, tenant=context.tenant)
            raise
        finally:
            current.set(**{"rpc.response.status_code": status})
            metrics.REQUESTS.inc(method=method, status=status, tenant=context.tenant)
            metrics.E2E_REQUEST_LATENCY_SECONDS.observe(time.perf_counter() - started, method=method)


def count_answer(completion: Completion) -> None:
    """Metrics of a finished answer."""
    mode = AttentionMode.Name(completion.attention_mode).removeprefix("ATTENTION_MODE_").lower()
    if completion.time_to_first_token_ms:
        metrics.TIME_TO_FIRST_TOKEN_SECONDS.observe(completion.time_to_first_token_ms / 1000, attention_mode=mode)
    metrics.PROMPT_TOKENS.inc(completion.usage.prompt_tokens, attention_mode=mode)
    metrics.PROMPT_TOKENS_CACHED.inc(completion.usage.cached_tokens, attention_mode=mode)
    for stage in completion.stages:
        metrics.STAGE_SECONDS.observe(stage.milliseconds / 1000, stage=stage.stage)
