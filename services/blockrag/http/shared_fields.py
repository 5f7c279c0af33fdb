"""What requests of both answering APIs share: OpenAI's fields that mean something here, and those that are refused.

A field that would change the answer and that this server does not do is refused; one that changes nothing (who the user
is, how the provider bills) is accepted and unused. What neither list knows is refused too.

Of a conversation, the same for both: the last message must be the user's, and its text is the question and what is
searched for; nothing of the turns before is. System and developer messages are put together and stand before the first
turn. Messages of one side that follow each other are one, with an empty line between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from blockrag.errors import InvalidRequestError, NotFoundError, UnsupportedError
from blockrag.v1 import rag_pb2
from blockrag.v1.common_pb2 import ConditionOperator, MetadataCondition

MODEL = "blockrag"
"""The model without documents; ``blockrag/COLLECTION`` answers from a collection."""

_OPERATORS = {
    "eq": ConditionOperator.CONDITION_OPERATOR_IN,
    "in": ConditionOperator.CONDITION_OPERATOR_IN,
    "ne": ConditionOperator.CONDITION_OPERATOR_NOT_IN,
    "nin": ConditionOperator.CONDITION_OPERATOR_NOT_IN,
    "gte": ConditionOperator.CONDITION_OPERATOR_AT_LEAST,
    "lte": ConditionOperator.CONDITION_OPERATOR_AT_MOST,
}
_BETWEEN = "\n\n"
INSTRUCTING = ("system", "developer")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Body(BaseModel):
    """A part of a request: unknown fields are refused, and so is what JSON can write and no text can be."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping):
            for name, value in fields.items():
                if problem := _not_json(name) or _not_json(value):
                    shown = str(name).encode("ascii", "backslashreplace").decode()[:100]
                    raise PydanticCustomError("no_json", "{name}: holds " + problem, {"name": shown})
        return fields


def _not_json(value: Any) -> str:
    """What Python's parser takes and no answer could say again; empty where there is none."""
    waiting = [value]  # not by recursion: JSON may be deeper than the interpreter's stack
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            if _SURROGATE.search(each) is not None:
                return "half of a surrogate pair"
        elif isinstance(each, float):
            if not math.isfinite(each):
                return "a number that is not finite"
        elif isinstance(each, Mapping):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
    return ""


def only(*allowed: Any) -> AfterValidator:
    """Accepts a field of OpenAI's with the values that change nothing."""

    def check(value: Any) -> Any:
        if any(value == each and type(value) is type(each) for each in allowed):
            return value
        named = " or ".join(str(each).lower() for each in allowed if each is not None)
        raise PydanticCustomError(
            "unsupported", "is not supported: leave it out" + (f", or say {named}" if named else "")
        )

    return AfterValidator(check)


Unused = Annotated[Any, Field(description="Accepted; changes nothing.")]
Refused = Annotated[Any, only(None), Field(description="Not supported.")]

Scalar = StrictStr | StrictBool | StrictInt | StrictFloat


class Comparison(Body):
    """A condition on a key of a document's metadata, as OpenAI writes it."""

    type: Literal["eq", "ne", "gte", "lte", "in", "nin"]
    """How to compare."""
    key: str
    """A top-level key."""
    value: Scalar | list[Scalar]
    """One value; for in and nin a list of values, all of one kind."""


class Conjunction(Body):
    """Conditions that must all hold."""

    type: Literal["and"]
    filters: list[Comparison]


Filter = Comparison | Conjunction


class RankingOptions(Body):
    """How passages are ranked; there is one way here."""

    ranker: Annotated[str | None, only(None, "auto", "none")] = None
    score_threshold: Annotated[float | None, only(None, 0.0)] = None


class FileSearch(Body):
    """Has the answer use the passages of a collection."""

    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], Field(min_length=1, max_length=1)]
    """One collection."""
    max_num_results: int | None = None
    """How many passages; left out: the server's default."""
    filters: Filter | None = None
    """Conditions on documents' metadata."""
    ranking_options: RankingOptions | None = None


class BlockragOptions(Body):
    """What blockrag can beyond OpenAI's API."""

    attention_mode: Literal["block", "full", "none"] | None = None
    """block (default): cached passages; full: plain causal attention, nothing is cached; none: no passages."""
    top_k: int | None = None
    """How many passages are retrieved."""
    filter: Filter | None = None
    """Conditions on documents' metadata."""
    rate: float | Literal["auto"] | None = None
    """Tokens of the passages divided by their slots in the prompt, from 1 to the tokens of a chunk; "auto": as few
    whole passages as the question seems to need."""
    max_ttft_ms: float | None = None
    """Most milliseconds until the first token, by what prefills cost of late."""
    policy: str | None = None
    """Who chooses what stays word for word: query, blind, sentences or retrieval, as far as the bundle has them."""
    max_context_tokens: int | None = None
    """Most slots that the passages may take."""
    timeout_ms: int | None = None
    """Gives up after so many milliseconds."""
    explain: bool | None = None
    """Say of each passage, chunk by chunk, what was read."""


class TextFormat(Body):
    """Plain text, the only format."""

    type: Literal["text"]


class StreamOptions(Body):
    """What a stream holds beside the text."""

    include_obfuscation: Annotated[bool | None, only(None, False)] = None


class Answering(Body):
    """Fields that chat completions and responses share."""

    model: str
    """blockrag, or blockrag/COLLECTION to answer from a collection."""
    stream: bool | None = False
    """Send the answer as server-sent events."""
    temperature: float | None = None
    """0 (the default): the likeliest token."""
    top_p: float | None = None
    """Nucleus mass in (0, 1]."""
    tools: list[FileSearch] | None = None
    """file_search alone, at most one."""
    blockrag: BlockragOptions | None = None
    """What OpenAI's API has no field for."""
    tool_choice: Annotated[Any, only(None, "auto")] = None
    top_logprobs: Annotated[int | None, only(None, 0)] = None
    user: Unused = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    service_tier: Unused = None
    parallel_tool_calls: Unused = None
    store: Annotated[bool | None, only(None, False)] = None

    @property
    def explains(self) -> bool:
        """Whether the answer is to say what was read of each chunk."""
        return self.blockrag is not None and bool(self.blockrag.explain)

    def params(self) -> dict[str, str]:
        """What this request calls the gateway's fields (``error_objects.named``)."""
        options, tool = self.blockrag or BlockragOptions(), self.tools[0] if self.tools else None
        return {
            "compression": "blockrag",
            "filter": "tools.0.filters" if tool and options.filter is None else "blockrag.filter",
            "top_k": "tools.0.max_num_results" if tool and options.top_k is None else "blockrag.top_k",
            "timeout_ms": "blockrag.timeout_ms",
            "attention_mode": "blockrag.attention_mode",
            "max_context_tokens": "blockrag.max_context_tokens",
            "collection": "model" if "/" in self.model else "tools.0.vector_store_ids",
        }


def collection_of(request: Answering) -> str:
    """The collection that a request answers from; empty: none. Raises what says that it cannot be."""
    name, slash, collection = request.model.partition("/")
    if name != MODEL or (slash and not collection):
        raise NotFoundError(f"the model {request.model!r} does not exist: there is {MODEL} and {MODEL}/COLLECTION")
    tools = request.tools or []
    if len(tools) > 1:
        raise UnsupportedError("tools", "at most one file_search is supported")
    if tools:
        (asked,) = tools[0].vector_store_ids
        if not asked or (collection and asked != collection):
            raise InvalidRequestError("tools", f"name the collection {asked!r} where the model names {collection!r}")
        return asked
    return collection


def generate_request(request: Answering) -> rag_pb2.GenerateRequest:
    """What both APIs say in the same way; question and the rest are the caller's to fill in."""
    options = request.blockrag or BlockragOptions()
    tool = request.tools[0] if request.tools else None
    collection = collection_of(request)
    mode = options.attention_mode or ("block" if collection else "none")
    if mode != "none" and not collection:
        raise InvalidRequestError("model", f"names no collection, which attention_mode {mode} answers from")
    message = rag_pb2.GenerateRequest(
        collection=collection,
        filter=conditions(options.filter, "blockrag.filter")
        + conditions(tool.filters if tool else None, "tools.0.filters"),
        attention_mode=f"ATTENTION_MODE_{mode.upper()}",
    )
    set_number(message, "top_k", tool.max_num_results if options.top_k is None and tool else options.top_k)
    set_number(message, "temperature", request.temperature)
    set_number(message, "top_p", request.top_p)
    set_number(message, "timeout_ms", options.timeout_ms)
    set_number(message, "max_context_tokens", options.max_context_tokens)
    if options.rate is not None and options.max_ttft_ms is not None:
        raise InvalidRequestError("blockrag", "rate and max_ttft_ms cannot both be asked for")
    if options.rate == "auto":
        message.compression.auto = True
    else:
        set_number(message.compression, "rate", options.rate, "blockrag.rate")
    set_number(message.compression, "max_ttft_ms", options.max_ttft_ms, "blockrag.max_ttft_ms")
    if options.policy:
        message.compression.policy = options.policy
    return message


def set_number(message: Any, field: str, value: float | None, param: str = "") -> None:
    """Sets a field that is left out where there is no value; ``InvalidRequestError`` where it cannot hold it."""
    if value is None:
        return
    try:
        setattr(message, field, value)
    except (ValueError, OverflowError, TypeError):
        raise InvalidRequestError(param or field, f"{value} is out of range") from None


def conditions(filter: Filter | None, param: str) -> list[MetadataCondition]:
    """The gateway's conditions; ``param`` names the field in what is raised."""
    if filter is None:
        return []
    return [_condition(each, param) for each in (filter.filters if isinstance(filter, Conjunction) else [filter])]


def _condition(comparison: Comparison, param: str) -> MetadataCondition:
    values: Sequence[Any] = comparison.value if isinstance(comparison.value, list) else [comparison.value]
    takes_list = comparison.type in ("in", "nin")
    if isinstance(comparison.value, list) != takes_list:
        raise InvalidRequestError(param, f"{comparison.type} takes {'a list' if takes_list else 'one value'}")
    condition = MetadataCondition(key=comparison.key, operator=_OPERATORS[comparison.type])
    for value in values:
        if isinstance(value, bool):
            condition.values.add(bool_value=value)
        elif isinstance(value, str):
            condition.values.add(string_value=value)
        else:
            try:
                condition.values.add(number_value=float(value))
            except OverflowError:
                raise InvalidRequestError(param, "holds a number that is out of range") from None
    return condition


@dataclass(frozen=True)
class Said:
    """One message."""

    role: str
    """system, developer, user or assistant."""
    text: str

    @classmethod
    def of(cls, role: str, content: str | list[Any]) -> Said:
        """``content``: the text, or parts that have some."""
        return cls(role, content if isinstance(content, str) else "".join(part.text for part in content))


def put_conversation(said: Sequence[Said], request: rag_pb2.GenerateRequest, param: str) -> None:
    """Fills question, turns and instructions of ``request``.

    Raises ``InvalidRequestError`` naming ``param`` when nobody asks, or an answer has no question.
    """
    request.instructions = _BETWEEN.join(one.text for one in said if one.role in INSTRUCTING)
    sides = groupby((one for one in said if one.role not in INSTRUCTING), key=lambda one: one.role)
    turns = [Said(role, _BETWEEN.join(one.text for one in together)) for role, together in sides]
    if not turns or turns[-1].role != "user":
        raise InvalidRequestError(param, "must end with a message of the user: that is the question")
    if turns[0].role != "user":
        raise InvalidRequestError(param, "a message of the assistant must have one of the user before it")
    *before, last = turns
    request.question = last.text
    for question, answer in zip(before[::2], before[1::2], strict=True):
        request.turns.add(question=question.text, answer=answer.text)
