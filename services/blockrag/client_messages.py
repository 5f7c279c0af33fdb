"""Protobuf messages to and from what the client's methods take and give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar, cast

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value

from blockrag.errors import BlockragError, DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from blockrag.metadata import check_number, metadata_of, struct_of
from blockrag.results import (
    AttentionModeName,
    BlockSlots,
    ChunkFormName,
    Citation,
    CitedChunk,
    Completion,
    Compression,
    Condition,
    Description,
    Document,
    FinishReasonName,
    IngestedDocument,
    IngestOutcomeName,
    Passage,
    PassageHolder,
    Retrieved,
    ServiceHealth,
    TextChunk,
    TraceSpan,
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
    return Passage(
        passage_id=message.passage_id,
        document_id=message.document_id,
        document_version=message.document_version,
        ordinal=message.ordinal,
        title=message.title,
        text=message.text,
        metadata=metadata_of(message.metadata),
        score=message.score,
        also_in=_holders(message.also_in),
    )


def ingested(message: corpus_pb2.IngestedDocument) -> IngestedDocument:
    """A stored document."""
    outcome = _name(corpus_pb2.IngestOutcome, message.outcome, "INGEST_OUTCOME_")
    return IngestedDocument(message.document_id, message.version, message.passages, cast(IngestOutcomeName, outcome))


def document(message: corpus_pb2.DocumentSummary) -> Document:
    """A listed document."""
    return Document(
        document_id=message.document_id,
        version=message.version,
        title=message.title,
        passages=message.passages,
        metadata=metadata_of(message.metadata),
        source=message.source,
    )


def description(message: system_pb2.DescribeResponse) -> Description:
    """The running system."""
    return Description(
        version=message.version,
        bundle_name=message.bundle_name,
        bundle_fingerprint=message.bundle_fingerprint,
        max_positions=message.max_positions,
        max_top_k=message.max_top_k,
        max_question_chars=message.max_question_chars,
        max_document_bytes=message.max_document_bytes,
        services=tuple(
            ServiceHealth(item.name, item.healthy, item.detail, item.milliseconds) for item in message.services
        ),
        retriever=_fields(message.retriever),
        encoder=_fields(message.encoder),
        kv_cache=_fields(message.kv_cache),
        decoder=_fields(message.decoder),
        chunk_tokens=message.chunk_tokens,
        compresses_chunks=message.compresses_chunks,
        tenants=tuple(map(_fields, message.tenants)),
    )


def trace_span(message: system_pb2.TraceSpan) -> TraceSpan:
    """A span that a service wrote."""
    return TraceSpan(
        span_id=message.span_id,
        parent_span_id=message.parent_span_id,
        name=message.name,
        service=message.service,
        start_unix_ns=message.start_unix_ns,
        end_unix_ns=message.end_unix_ns,
        attributes=dict(message.attributes),
        error=message.error,
    )


def passes_by_itself(error: BlockragError) -> bool:
    """Whether the same call may succeed a little later."""
    return isinstance(error, UnavailableError | OverloadedError | DeadlineError)


def _completion(message: rag_pb2.GenerateResponse) -> Completion:
    done = message.completion
    usage = done.usage
    return Completion(
        request_id=message.request_id,
        answer=done.answer,
        citations=tuple(
            Citation(
                index=item.index,
                passage_id=item.passage_id,
                document_id=item.document_id,
                title=item.title,
                tokens=item.tokens,
                in_prompt=item.in_prompt,
                dropped_reason=item.dropped_reason,
                chunks=tuple(
                    CitedChunk(
                        chunk.start_token,
                        chunk.end_token,
                        cast(ChunkFormName, _name(common_pb2.ChunkForm, chunk.form, "CHUNK_FORM_")),
                        chunk.text,
                    )
                    for chunk in item.chunks
                ),
                also_in=_holders(item.also_in),
                slots=_slots(item.slots),
            )
            for item in done.citations
        ),
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            l1_tokens=usage.l1_tokens,
            store_tokens=usage.store_tokens,
            encoded_tokens=usage.encoded_tokens,
            prefill_tokens=usage.prefill_tokens,
            completion_tokens=usage.completion_tokens,
            context_tokens=usage.context_tokens,
            compressed_chunks=usage.compressed_chunks,
            disk_tokens=usage.disk_tokens,
        ),
        stages_ms={stage.stage: stage.milliseconds for stage in done.stages},
        finish_reason=cast(FinishReasonName, _name(common_pb2.FinishReason, done.finish_reason, "FINISH_REASON_")),
        time_to_first_token_ms=done.time_to_first_token_ms,
        seed=done.seed,
        bundle_fingerprint=done.bundle_fingerprint,
        attention_mode=cast(AttentionModeName, _name(common_pb2.AttentionMode, done.attention_mode, "ATTENTION_MODE_")),
        trace_id=done.trace_id,
        instruction_slots=_slots(done.instruction_slots),
        turn_slots=tuple(map(_slots, done.turn_slots)),
    )


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


def _slots(message: common_pb2.BlockSlots) -> BlockSlots:
    return BlockSlots(message.l1, message.store, message.disk, message.encoded)


def _holders(messages: Iterable[common_pb2.PassageHolder]) -> tuple[PassageHolder, ...]:
    return tuple(PassageHolder(item.passage_id, item.document_id, item.title) for item in messages)


def _name(enum: Any, value: int, prefix: str) -> str:
    name: str = enum.Name(value)
    return name.removeprefix(prefix).lower()


def _fields(message: Message) -> dict[str, Any]:
    return {field.name: _plain(getattr(message, field.name), field.is_repeated) for field in message.DESCRIPTOR.fields}


def _plain(value: Any, repeated: bool) -> Any:
    if repeated:
        return [_plain(item, False) for item in value]
    return _fields(value) if isinstance(value, Message) else value


async def byte_pieces(content: bytes) -> AsyncIterator[bytes]:
    """A document as it is sent."""
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


async def file_pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    """A file from its beginning, as it is sent; read in a thread."""
    await asyncio.to_thread(file.seek, 0)
    while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
        yield piece
