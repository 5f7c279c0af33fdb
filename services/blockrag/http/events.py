"""A gateway's answer as it comes, and server-sent events made of it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse

from blockrag.alike import fields_of
from blockrag.errors import UnavailableError
from blockrag.v1 import rag_pb2
from blockrag.v1.common_pb2 import ChunkForm, Passage

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with stream as server-sent events.", "content": {"text/event-stream": {}}}
}
"""For the OpenAPI schema of paths that may stream."""
# Lines end with these for Python's splitlines, and so for clients that read events by httpx's lines.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_ENDED_EARLY = "the answer ended without its completion; ask again"


class Answer:
    """An answer under way: what was retrieved is known, and that the decoder has begun.

    Until then nothing is sent to the client, so that whatever goes wrong has a status of its own.
    """

    def __init__(self, events: AsyncGenerator[rag_pb2.GenerateResponse, None]) -> None:
        self._events = events
        self._first: rag_pb2.GenerateResponse | None = None
        self.passages: list[Passage] = []
        self.request_id = ""
        self.completion: rag_pb2.Completion | None = None
        """Known when all of ``texts`` was read."""

    @classmethod
    async def begin(cls, events: AsyncGenerator[rag_pb2.GenerateResponse, None]) -> Answer:
        """Waits for the first text. Raises what the gateway raises; then the stream is closed."""
        answer = cls(events)
        try:
            async for event in events:
                answer.request_id = event.request_id
                if not event.HasField("retrieved"):
                    answer._first = event
                    return answer
                answer.passages.extend(event.retrieved.passages)
        except BaseException:
            await events.aclose()
            raise
        raise UnavailableError(_ENDED_EARLY)

    async def texts(self) -> AsyncGenerator[str, None]:
        """The pieces of text. Closing it, or not reading to its end, stops the answer."""
        async with aclosing(self._events):
            event = self._first
            while event is not None:
                if event.HasField("completion"):
                    self.completion = event.completion
                    return
                if event.text.text:
                    yield event.text.text
                event = await anext(self._events, None)
        raise UnavailableError(_ENDED_EARLY)

    async def finished(self) -> rag_pb2.Completion:
        """Reads to the end."""
        async for _ in self.texts():
            pass
        assert self.completion is not None
        return self.completion


def server_sent(lines: AsyncIterator[str]) -> StreamingResponse:
    """A response that sends events as they come, unbuffered by proxies."""
    return StreamingResponse(
        lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )


def data(message: dict[str, Any], event: str = "") -> str:
    """One event."""
    name = f"event: {event}\n" if event else ""
    text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
    for end, escaped in _LINE_ENDS.items():
        text = text.replace(end, escaped)
    return f"{name}data: {text}\n\n"


def usage_details(completion: rag_pb2.Completion, *, explain: bool = False) -> dict[str, Any]:
    """What blockrag says of an answer beyond OpenAI's fields; ``explain``: of each chunk too."""
    usage = completion.usage
    return {
        "citations": [_citation(citation, explain) for citation in completion.citations],
        "instruction_slots": fields_of(completion.instruction_slots),
        "turn_slots": [fields_of(slots) for slots in completion.turn_slots],
        "stages_ms": {stage.stage: round(stage.milliseconds, 3) for stage in completion.stages},
        "time_to_first_token_ms": round(completion.time_to_first_token_ms, 3),
        "usage": fields_of(usage),
        "seed": completion.seed,
        "trace_id": completion.trace_id,
    }


def _citation(citation: rag_pb2.Citation, explain: bool) -> dict[str, Any]:
    names = ("passage_id", "document_id", "title", "tokens", "in_prompt", "dropped_reason", "place")
    told: dict[str, Any] = {name: getattr(citation, name) for name in names}
    told["slots"] = fields_of(citation.slots)
    if explain:
        told["chunks"] = [
            {**fields_of(chunk), "form": ChunkForm.Name(chunk.form).removeprefix("CHUNK_FORM_").lower()}
            for chunk in citation.chunks
        ]
    return told


def file_id(collection: str, document_id: str) -> str:
    """The id of a document among files."""
    return f"{collection}/{document_id}"


def cited_documents(completion: rag_pb2.Completion) -> Iterable[str]:
    """Ids of the documents of which something was in the prompt, best first, each once; of equal passages all."""
    return dict.fromkeys(
        document_id
        for citation in completion.citations
        if citation.in_prompt and citation.document_id
        for document_id in (citation.document_id, *(holder.document_id for holder in citation.also_in))
    )
