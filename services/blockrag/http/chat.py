"""Chat completions: the request, and the answer whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import JSONResponse, Response

from blockrag.http.door import Visit
from blockrag.http.error_objects import error_detail, named
from blockrag.http.events import STREAMED, Answer, data, server_sent, usage_details
from blockrag.http.shared_fields import (
    Answering,
    Body,
    Refused,
    Said,
    StreamOptions,
    TextFormat,
    Unused,
    generate_request,
    only,
    put_conversation,
    set_number,
)
from blockrag.v1 import common_pb2, rag_pb2

router = APIRouter()
_REASONS = {
    common_pb2.FINISH_REASON_END: "stop",
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


class TextPart(Body):
    """A piece of a message; text alone is supported."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Unused = None
    annotations: Unused = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None
    tool_calls: Annotated[Any, only(None, [])] = None


class UsageOptions(StreamOptions):
    """What a stream holds beside the text."""

    include_usage: bool | None = False
    """A last chunk with the usage."""


class ChatRequest(Answering):
    """``POST /v1/chat/completions``. The last message is the question and what is searched for; those before are in
    the prompt as earlier turns, cached like passages."""

    messages: Annotated[list[Message], Field(min_length=1)]
    stream_options: UsageOptions | None = None
    max_tokens: int | None = None
    """Most tokens of the answer; left out: the server's default."""
    max_completion_tokens: int | None = None
    """The same, by its newer name."""
    seed: int | None = None
    """Of the request's own random stream."""
    stop: str | list[str] | None = None
    """The answer ends before the first of these."""
    n: Annotated[int | None, only(None, 1)] = None
    logprobs: Annotated[bool | None, only(None, False)] = None
    response_format: TextFormat | None = None
    presence_penalty: Annotated[float | None, only(None, 0.0)] = None
    frequency_penalty: Annotated[float | None, only(None, 0.0)] = None
    logit_bias: Annotated[dict[str, Any] | None, only(None, {})] = None
    modalities: Annotated[list[str] | None, only(None, ["text"])] = None

    def to_message(self) -> rag_pb2.GenerateRequest:
        """The gateway's request. Raises ``InvalidRequestError``, ``NotFoundError``."""
        message = generate_request(self)
        put_conversation([Said.of(one.role, one.content) for one in self.messages], message, "messages")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        set_number(message, "max_tokens", most, self.params()["max_tokens"])
        set_number(message, "seed", self.seed)
        message.stop.extend([self.stop] if isinstance(self.stop, str) else self.stop or [])
        return message

    def params(self) -> dict[str, str]:
        own = dict.fromkeys(("question", "turns", "instructions"), "messages")
        own["max_tokens"] = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().params(), **own}


def usage_of(usage: common_pb2.Usage) -> dict[str, Any]:
    """Token counts as clients read them: cached tokens are part of the prompt's."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@router.post("/chat/completions", responses=STREAMED)
async def create_chat_completion(body: ChatRequest, visit: Visit) -> Response:
    """Answers the last message of a conversation."""
    with named(**body.params()):
        answer = await Answer.begin(visit.gateway.generate(body.to_message(), visit.call))
    if body.stream:
        return server_sent(chunks(body, answer))
    return JSONResponse(await whole(body, answer))


async def whole(request: ChatRequest, answer: Answer) -> dict[str, Any]:
    """The completion object."""
    completion = await answer.finished()
    message = {"role": "assistant", "content": completion.answer, "refusal": None}
    return {
        **_envelope(request, answer, "chat.completion"),
        "system_fingerprint": completion.bundle_fingerprint,
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": _REASONS[completion.finish_reason]}
        ],
        "usage": usage_of(completion.usage),
        "blockrag": usage_details(completion, explain=request.explains),
    }


async def chunks(request: ChatRequest, answer: Answer) -> AsyncIterator[str]:
    """Server-sent chunks, the last before ``[DONE]`` with usage where it was asked for."""
    envelope = _envelope(request, answer, "chat.completion.chunk")
    with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
    if with_usage:
        envelope["usage"] = None

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return data({**envelope, "choices": [choice], **more})

    texts = answer.texts()
    try:
        opening: dict[str, Any] = {"role": "assistant"}
        async for text in texts:
            yield chunk({**opening, "content": text})
            opening = {}
        completion = answer.completion
        assert completion is not None
        if opening:
            yield chunk({**opening, "content": ""})
        more = {
            "system_fingerprint": completion.bundle_fingerprint,
            "blockrag": usage_details(completion, explain=request.explains),
        }
        yield chunk({}, _REASONS[completion.finish_reason], **more)
        if with_usage:
            yield data({**envelope, "choices": [], "usage": usage_of(completion.usage)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield data({"error": error_detail(error)[1].model_dump()})
    finally:
        await texts.aclose()


def _envelope(request: ChatRequest, answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": None,
    }
