"""Responses: the request, and the answer whole or as events."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from google.protobuf.struct_pb2 import Struct
from pydantic import Field
from starlette.responses import JSONResponse, Response

from blockrag.http.door import Visit
from blockrag.http.error_objects import error_detail, named
from blockrag.http.events import STREAMED, Answer, cited_documents, data, file_id, server_sent, usage_details
from blockrag.http.shared_fields import (
    Answering,
    Body,
    Refused,
    Said,
    StreamOptions,
    TextFormat,
    Unused,
    collection_of,
    generate_request,
    only,
    put_conversation,
    set_number,
)
from blockrag.metadata import metadata_of
from blockrag.v1 import common_pb2, rag_pb2

router = APIRouter()
RESULTS = "file_search_call.results"
"""What ``include`` asks for the passages by."""


class TextPart(Body):
    """A piece of a message; text alone is supported. The rest is what an earlier answer came with."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Unused = None
    logprobs: Unused = None


class MessageItem(Body):
    """One message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: Unused = None
    status: Unused = None
    phase: Unused = None


class SearchItem(Body):
    """An earlier answer's search; passages are searched anew for each question, so it changes nothing."""

    type: Literal["file_search_call"]
    id: Unused = None
    status: Unused = None
    queries: Unused = None
    results: Unused = None


class TextOptions(Body):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Annotated[str | None, only(None, "medium")] = None


class ResponsesRequest(Answering):
    """``POST /v1/responses``. Nothing is stored, so a conversation comes whole with each request."""

    input: str | Annotated[list[SearchItem | MessageItem], Field(min_length=1)]
    """The question, or a conversation that ends with it."""
    instructions: str | None = None
    """What is asked of every answer."""
    max_output_tokens: int | None = None
    """Most tokens of the answer; left out: the server's default."""
    include: list[Literal["file_search_call.results"]] | None = None
    """file_search_call.results: the passages that were found."""
    text: TextOptions | None = None
    stream_options: StreamOptions | None = None
    truncation: Annotated[str | None, only(None, "disabled")] = None
    background: Annotated[bool | None, only(None, False)] = None
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    reasoning: Refused = None
    max_tool_calls: Refused = None

    def to_message(self) -> rag_pb2.GenerateRequest:
        """The gateway's request. Raises ``InvalidRequestError``, ``NotFoundError``."""
        message = generate_request(self)
        said = [Said("system", self.instructions)] if self.instructions else []
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        said += [Said.of(item.role, item.content) for item in items if isinstance(item, MessageItem)]
        put_conversation(said, message, "input")
        set_number(message, "max_tokens", self.max_output_tokens, "max_output_tokens")
        return message

    def params(self) -> dict[str, str]:
        own = dict.fromkeys(("question", "turns"), "input")
        own["instructions"] = "instructions" if self.instructions else "input"
        return {**super().params(), **own, "max_tokens": "max_output_tokens"}


class _Writer:
    """The objects of one response."""

    def __init__(self, request: ResponsesRequest, question: str, answer: Answer) -> None:
        self._request = request
        self._question = question
        self._answer = answer
        self._created = int(time.time())
        self.collection = collection_of(request)
        self.message_id = f"msg_{answer.request_id}"
        self.search_id = f"fs_{answer.request_id}"

    def response(self, output: list[dict[str, Any]], status: str) -> dict[str, Any]:
        request, completion = self._request, self._answer.completion
        cut = self.message_status() == "incomplete"
        return {
            "id": f"resp_{self._answer.request_id}",
            "object": "response",
            "created_at": self._created,
            "status": "incomplete" if cut else status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in request.tools or []],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if completion is None else _usage(completion.usage),
            "user": request.user,
            **({} if completion is None else {"blockrag": usage_details(completion, explain=request.explains)}),
        }

    def search(self, status: str) -> dict[str, Any]:
        results = None
        if status == "completed" and RESULTS in (self._request.include or []):
            results = [
                {
                    "file_id": file_id(self.collection, passage.document_id),
                    "filename": passage.document_id,
                    "score": passage.score,
                    "text": passage.text,
                    "attributes": attributes(passage.metadata),
                }
                for passage in self._answer.passages
            ]
        return {
            "id": self.search_id,
            "type": "file_search_call",
            "status": status,
            "queries": [self._question],
            "results": results,
        }

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def annotations(self) -> list[dict[str, Any]]:
        """The documents that the answer was read from; where in it, nobody knows, so each stands at its end."""
        completion = self._answer.completion
        assert completion is not None
        return [
            {
                "type": "file_citation",
                "index": len(completion.answer),
                "file_id": file_id(self.collection, document_id),
                "filename": document_id,
            }
            for document_id in cited_documents(completion)
        ]

    def output(self) -> list[dict[str, Any]]:
        completion = self._answer.completion
        assert completion is not None
        found = [self.search("completed")] if self.collection else []
        part = text_part(completion.answer, self.annotations())
        return [*found, self.message(self.message_status(), [part])]

    def message_status(self) -> str:
        completion = self._answer.completion
        cut = completion is not None and completion.finish_reason == common_pb2.FINISH_REASON_LENGTH
        return "incomplete" if cut else "completed"


def text_part(text: str, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """A message's text with what it was read from."""
    return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": []}


def attributes(metadata: Struct) -> dict[str, Any]:
    """A document's metadata, as far as OpenAI's attributes can hold it: texts, numbers, booleans."""
    return {key: value for key, value in metadata_of(metadata).items() if isinstance(value, str | int | float)}


@router.post("/responses", responses=STREAMED)
async def create_response(body: ResponsesRequest, visit: Visit) -> Response:
    """Answers with the documents that were read as citations."""
    with named(**body.params()):
        message = body.to_message()
        answer = await Answer.begin(visit.gateway.generate(message, visit.call))
    if body.stream:
        return server_sent(events(body, message.question, answer))
    return JSONResponse(await whole(body, message.question, answer))


async def whole(request: ResponsesRequest, question: str, answer: Answer) -> dict[str, Any]:
    """The response object."""
    await answer.finished()
    writer = _Writer(request, question, answer)
    return writer.response(writer.output(), "completed")


async def events(request: ResponsesRequest, question: str, answer: Answer) -> AsyncIterator[str]:
    """Server-sent events from ``response.created`` to ``response.completed`` or ``response.incomplete``."""
    writer = _Writer(request, question, answer)
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> str:
        return data({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    texts = answer.texts()
    try:
        yield event("response.created", response=writer.response([], "in_progress"))
        yield event("response.in_progress", response=writer.response([], "in_progress"))
        place = 0
        if writer.collection:
            item = {"item_id": writer.search_id, "output_index": place}
            started = writer.search("in_progress")
            yield event("response.output_item.added", output_index=place, item=started)
            for step in ("in_progress", "searching", "completed"):
                yield event(f"response.file_search_call.{step}", **item)
            yield event("response.output_item.done", output_index=place, item=writer.search("completed"))
            place = 1
        within = {"item_id": writer.message_id, "output_index": place, "content_index": 0}
        opened = writer.message("in_progress", [])
        yield event("response.output_item.added", output_index=place, item=opened)
        yield event("response.content_part.added", **within, part=text_part("", []))
        async for text in texts:
            yield event("response.output_text.delta", **within, delta=text, logprobs=[])
        completion = answer.completion
        assert completion is not None
        cited = writer.annotations()
        for index, annotation in enumerate(cited):
            yield event(
                "response.output_text.annotation.added", **within, annotation_index=index, annotation=annotation
            )
        yield event("response.output_text.done", **within, text=completion.answer, logprobs=[])
        yield event("response.content_part.done", **within, part=text_part(completion.answer, cited))
        output = writer.output()
        yield event("response.output_item.done", output_index=place, item=output[-1])
        yield event(f"response.{writer.message_status()}", response=writer.response(output, writer.message_status()))
    except Exception as error:
        detail = error_detail(error)[1]
        yield event("error", code=detail.code, message=detail.message, param=detail.param)
    finally:
        await texts.aclose()


def _usage(usage: common_pb2.Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
