"""What OpenAI's API has no path for: the system and its limits, traces, encoding ahead of time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import JSONResponse, Response

from blockrag.alike import fields_of
from blockrag.errors import NotFoundError
from blockrag.http.door import Visit
from blockrag.http.error_objects import error_detail
from blockrag.http.events import STREAMED, data, server_sent
from blockrag.http.shared_fields import Body
from blockrag.http.vector_stores import within
from blockrag.identity import DEFAULT_COLLECTION
from blockrag.v1 import corpus_pb2, system_pb2

router = APIRouter()


class WarmBody(Body):
    """``POST /v1/blockrag/warm``."""

    collection: str = DEFAULT_COLLECTION
    file_ids: Annotated[list[str], Field(max_length=1000, default_factory=list)]
    """Files of the collection; none: all of it."""
    stream: bool = False
    """Say how far it is, as server-sent events."""

    def to_message(self) -> corpus_pb2.WarmRequest:
        """The gateway's request. Raises ``NotFoundError`` for a file of another collection."""
        document_ids = [within(self.collection, id)[1] for id in self.file_ids]
        return corpus_pb2.WarmRequest(collection=self.collection, document_ids=document_ids)


async def _warming_events(
    first: corpus_pb2.WarmResponse, steps: AsyncGenerator[corpus_pb2.WarmResponse, None]
) -> AsyncIterator[str]:
    """Server-sent events of a warming up to ``[DONE]``; closing it stops the work."""
    async with aclosing(steps):
        try:
            yield data(_warming(first))
            async for step in steps:
                yield data(_warming(step))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield data({"error": error_detail(error)[1].model_dump()})


def _warming(step: corpus_pb2.WarmResponse) -> dict[str, Any]:
    return {"object": "blockrag.warming", **fields_of(step)}


@router.get("/blockrag/system")
async def get_system(visit: Visit) -> dict[str, Any]:
    """The bundle that answers, the limits of requests, and every service."""
    found = await visit.gateway.describe(None, visit.call)
    return {
        "object": "blockrag.system",
        "version": found.version,
        "bundle": {
            "name": found.bundle_name,
            "fingerprint": found.bundle_fingerprint,
            "chunk_tokens": found.chunk_tokens,
            "compresses_chunks": found.compresses_chunks,
        },
        "limits": {
            name: getattr(found, name)
            for name in ("max_positions", "max_top_k", "max_question_chars", "max_document_bytes")
        },
        "services": [fields_of(service) for service in found.services],
    }


@router.get("/blockrag/traces/{trace_id}")
async def get_trace(trace_id: str, visit: Visit) -> dict[str, Any]:
    """The spans of a request whose answer named it in ``blockrag.trace_id``. Services write them a moment later,
    so there may be none yet."""
    try:
        spans = (await visit.gateway.trace(system_pb2.GetTraceRequest(trace_id=trace_id), visit.call)).spans
    except NotFoundError:
        spans = system_pb2.GetTraceResponse().spans
    # In order of their start, which counts from the first one's.
    began = spans[0].start_unix_ns if spans else 0
    return {
        "object": "blockrag.trace",
        "id": trace_id,
        "began_at": began / 1e9,
        "spans": [
            {
                "span_id": span.span_id,
                "parent_span_id": span.parent_span_id,
                "name": span.name,
                "service": span.service,
                "start_ms": (span.start_unix_ns - began) / 1e6,
                "milliseconds": (span.end_unix_ns - span.start_unix_ns) / 1e6,
                "attributes": dict(span.attributes),
                "error": span.error,
            }
            for span in spans
        ],
    }


@router.post("/blockrag/warm", responses=STREAMED)
async def warm(body: WarmBody, visit: Visit) -> Response:
    """Encodes a collection's passages ahead of time, or those of some of its files."""
    steps = visit.gateway.warm(body.to_message(), visit.call)
    last = await anext(steps, corpus_pb2.WarmResponse())  # before any event: what refuses it has a status of its own
    if body.stream:
        return server_sent(_warming_events(last, steps))
    async with aclosing(steps):
        async for step in steps:
            last = step
    return JSONResponse(_warming(last))
