"""Protobuf messages to and from what the client's methods take and give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value

from blockrag.alike import alike, fields_of
from blockrag.errors import InvalidRequestError
from blockrag.metadata import check_number, metadata_of, struct_of
from blockrag.results import (
    BlockSlots,
    Citation,
    CitedChunk,
    Completion,
    Compression,
    Condition,
    Description,
    Document,
    IngestedDocument,
    Passage,
    PassageHolder,
    Retrieved,
    ServiceHealth,
    TextChunk,
    Usage,
)
from blockrag.v1 import common_pb2, corpus_pb2, rag_pb2, system_pb2

_PIECE_BYTES = 512 * 1024
_OPERATORS = {
    "in": common_pb2.CONDITION_OPERATOR_IN,
    "not_in": common_pb2.CONDITION_OPERATOR_NOT_IN,
    "at_least": common_pb2.CONDITION_OPERATOR_AT_LEAST,
    "at_most": common_pb2.CONDITION_OPERATOR_AT_MOST,
}
MAX_TIMEOUT_S = 7 * 24 * 3600.0
"""Longer than any server waits, and within what gRPC and the message can say."""

M = TypeVar("M", bound=Message)

_BUDGETS = ("rate", "max_context_tokens", "max_ttft_ms")
_COPIED = ("top_k", "max_tokens", "temperature", "top_p", "seed", "max_context_tokens")


def made(kind: type[M], **fields: Any) -> M:
    """A message; ``InvalidRequestError`` naming the field of a text that is none, or for what no message can hold."""
    for field, text in fields.items():
        if isinstance(text, str):
            encoded(text, field)
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:  # the second for text within a list that is none, too
        raise InvalidRequestError("request", str(error)) from error


def encoded(text: str, field: str = "content") -> bytes:
    """As UTF-8; ``InvalidRequestError`` naming the field where it holds half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        # A name of a file that is not UTF-8 comes as halves of surrogate pairs.
        shown = text[:200].encode("utf-8", "backslashreplace").decode("utf-8")
        where = f", at {error.start}" if len(text) > len(text[:200]) else ""
        raise InvalidRequestError(
            field, f"{shown!r} is no Unicode text{where}; give another, or rename the file"
        ) from None


def generate_request(question: str, timeout_s: float, options: Mapping[str, Any]) -> rag_pb2.GenerateRequest:
    """The request of a question; ``timeout_s`` by ``checked_timeout``.

    Raises ``InvalidRequestError`` for what no message can hold.
    """
    try:
        passages = [
            made(rag_pb2.GivenPassage, title=given.title, text=given.text) for given in options.get("passages", ())
        ]
        turns = [made(common_pb2.Turn, question=asked, answer=said) for asked, said in options.get("turns", ())]
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequestError("request", str(error)) from error
    request = made(
        rag_pb2.GenerateRequest,
        question=question,
        collection=options.get("collection", ""),
        filter=conditions(options.get("filter", ())),
        attention_mode=_mode(options.get("attention_mode")),
        stop=[stop] if isinstance(stop := options.get("stop", ()), str) else stop,
        timeout_ms=max(1, round(timeout_s * 1000)),
        passages=passages,
        turns=turns,
        instructions=options.get("instructions", ""),
    )
    for name in _COPIED:
        value = options.get(name)
        if value is not None:
            _set(request, name, value)
    if options.get("compression") is not None:
        request.compression.CopyFrom(compression(options["compression"]))
    return request


def compression(wanted: Compression) -> common_pb2.Compression:
    """As a message. Raises ``InvalidRequestError`` for none or several budgets, or one that no message can hold."""
    budgets = {name: value for name in _BUDGETS if (value := getattr(wanted, name)) is not None}
    if len(budgets) != 1:
        raise InvalidRequestError("compression", f"needs one of {', '.join(_BUDGETS)}; has {len(budgets)}")
    message = made(common_pb2.Compression, policy=wanted.policy)
    for name, value in budgets.items():
        if value == "auto":
            message.auto = True
        else:
            _set(message, name, value, "compression.")
    return message


def retrieve_request(
    query: str, collection: str, top_k: int | None, filter: Mapping[str, Any] | Sequence[Condition]
) -> rag_pb2.RetrieveRequest:
    """The request of a search."""
    request = made(rag_pb2.RetrieveRequest, query=query, collection=collection, filter=conditions(filter))
    if top_k is not None:
        _set(request, "top_k", top_k)
    return request


def conditions(filter: Mapping[str, Any] | Sequence[Condition]) -> list[common_pb2.MetadataCondition]:
    """Conditions as messages; of a mapping, that each field equals its value."""
    if isinstance(filter, Mapping):
        filter = [Condition(key, "in", _several(value)) for key, value in filter.items()]
    return [_condition(condition) for condition in filter]


def checked_timeout(timeout_s: float) -> float:
    """At most ``MAX_TIMEOUT_S``: the server caps it further. Raises ``InvalidRequestError`` for what is no time."""
    if not timeout_s > 0:  # refuses NaN as well
        raise InvalidRequestError("timeout_s", f"is {timeout_s}; must be above 0")
    return min(timeout_s, MAX_TIMEOUT_S)


def _condition(condition: Condition) -> common_pb2.MetadataCondition:
    if not isinstance(condition, Condition):
        raise InvalidRequestError("filter", f"holds a {type(condition).__name__}; give Conditions, or a mapping")
    if condition.operator not in _OPERATORS:
        raise InvalidRequestError("filter", f"operator {condition.operator!r} is none of {', '.join(_OPERATORS)}")
    return made(
        common_pb2.MetadataCondition,
        key=condition.key,
        operator=_OPERATORS[condition.operator],
        values=[_value(condition.key, value) for value in _several(condition.values)],
    )


def _several(value: Any) -> tuple[Any, ...]:
    """Any of these: the elements of a list, or the one value."""
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)


def header(document_id: str, **options: Any) -> corpus_pb2.DocumentHeader:
    """The first message of an ingest; ``options`` are ``IngestOptions``.

    Raises ``InvalidRequestError`` naming what is no Unicode text, and for metadata that no struct holds.
    """
    metadata = options.pop("metadata", None) or {}
    try:
        struct = struct_of(metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidRequestError("metadata", f"is not JSON: {error}") from error
    return made(corpus_pb2.DocumentHeader, document_id=document_id, metadata=struct, **options)


def event(message: rag_pb2.GenerateResponse) -> Retrieved | TextChunk | Completion:
    """One event of an answer."""
    kind = message.WhichOneof("event")
    if kind == "retrieved":
        return Retrieved(tuple(passage(found) for found in message.retrieved.passages))
    if kind == "text":
        return TextChunk(message.text.text, message.text.tokens)
    return _completion(message)


def passage(message: common_pb2.Passage) -> Passage:
    """A retrieved passage."""
    return alike(Passage, message, metadata=metadata_of(message.metadata), also_in=_holders(message.also_in))


def ingested(message: corpus_pb2.IngestedDocument) -> IngestedDocument:
    """A stored document."""
    outcome = _name(corpus_pb2.IngestOutcome, message.outcome, "INGEST_OUTCOME_")
    return alike(IngestedDocument, message, outcome=outcome)


def document(message: corpus_pb2.DocumentSummary) -> Document:
    """A listed document."""
    return alike(Document, message, metadata=metadata_of(message.metadata))


def description(message: system_pb2.DescribeResponse) -> Description:
    """The running system."""
    services = ("retriever", "encoder", "kv_cache", "decoder")
    return alike(
        Description,
        message,
        services=tuple(alike(ServiceHealth, item) for item in message.services),
        tenants=tuple(map(fields_of, message.tenants)),
        **{name: fields_of(getattr(message, name)) for name in services},
    )


def _completion(message: rag_pb2.GenerateResponse) -> Completion:
    done = message.completion
    return alike(
        Completion,
        done,
        request_id=message.request_id,
        citations=tuple(map(_citation, done.citations)),
        usage=alike(Usage, done.usage),
        stages_ms={stage.stage: stage.milliseconds for stage in done.stages},
        finish_reason=_name(common_pb2.FinishReason, done.finish_reason, "FINISH_REASON_"),
        attention_mode=_name(common_pb2.AttentionMode, done.attention_mode, "ATTENTION_MODE_"),
        instruction_slots=alike(BlockSlots, done.instruction_slots),
        turn_slots=tuple(alike(BlockSlots, slots) for slots in done.turn_slots),
    )


def _citation(message: rag_pb2.Citation) -> Citation:
    chunks = (
        alike(CitedChunk, chunk, form=_name(common_pb2.ChunkForm, chunk.form, "CHUNK_FORM_"))
        for chunk in message.chunks
    )
    slots = alike(BlockSlots, message.slots)
    return alike(Citation, message, chunks=tuple(chunks), also_in=_holders(message.also_in), slots=slots)


def _mode(name: str | None) -> Any:
    if name is None:
        return common_pb2.ATTENTION_MODE_UNSPECIFIED
    try:
        return common_pb2.AttentionMode.Value(f"ATTENTION_MODE_{name.upper()}")
    except ValueError:
        raise InvalidRequestError("attention_mode", f"{name!r} is none of block, full, none") from None


def _set(request: Message, name: str, value: Any, within: str = "") -> None:
    try:
        setattr(request, name, value)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"{within}{name}", str(error)) from error


def _value(key: str, value: Any) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    if isinstance(value, str):
        return made(Value, string_value=value)
    if not isinstance(value, int | float):
        kind = type(value).__name__
        raise InvalidRequestError("filter", f"a value of {key!r} is a {kind}; give text, numbers, true or false")
    check_number(value, "filter", f"a value of {key!r}")
    return Value(number_value=value)


def _holders(messages: Iterable[common_pb2.PassageHolder]) -> tuple[PassageHolder, ...]:
    return tuple(alike(PassageHolder, item) for item in messages)


def _name(enum: Any, value: int, prefix: str) -> str:
    name: str = enum.Name(value)
    return name.removeprefix(prefix).lower()


async def byte_pieces(content: bytes) -> AsyncIterator[bytes]:
    """A document as it is sent."""
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


async def file_pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    """A file from its beginning, as it is sent; read in a thread."""
    await asyncio.to_thread(file.seek, 0)
    while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
        yield piece
