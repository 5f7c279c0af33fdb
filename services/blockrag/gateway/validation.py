"""Checks of what clients send. Every refusal names the field; nothing has been stored or computed by then."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from blockrag.characters import check_line, check_text, is_blank, normalise
from blockrag.compressor.compression_request import (
    CompressionAbility,
    CompressionRequest,
    read_compression,
    sizes_decide,
)
from blockrag.errors import InvalidRequestError, SettingsError
from blockrag.identity import DEFAULT_COLLECTION, check_collection_name, check_document_id
from blockrag.languages import LANGUAGES
from blockrag.limits import MAX_TEMPERATURE
from blockrag.metadata import MAX_TITLE_CHARS, check_filter, check_key, metadata_of
from blockrag.settings import GatewaySettings
from blockrag.v1 import common_pb2, corpus_pb2, rag_pb2
from blockrag.v1.common_pb2 import AttentionMode, MetadataCondition, Sampling
from blockrag.v1.retriever_pb2 import SearchRequest

MAX_TOKENS = 100_000
"""Beyond any model; the decoder refuses what its own model cannot hold."""
MAX_STOP_STRINGS = 8
MAX_STOP_CHARS = 64
MAX_GIVEN_CHARS = 65_536
"""Longest text of a given passage, in characters."""
MAX_GIVEN_TOTAL_CHARS = 262_144
"""Longest text of all given passages together: they travel in one message of at most 4 MB."""
MAX_TURNS = 128
MAX_CONVERSATION_CHARS = 262_144
"""Longest text of instructions and earlier turns together."""
MAX_SOURCE_CHARS = 1024
DEFAULT_PAGE, MAX_PAGE = 100, 500
MAX_WARM_DOCUMENTS = 10_000

_TRACE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Question:
    """A valid GenerateRequest with every default filled in."""

    text: str
    collection: str
    top_k: int
    filter: tuple[MetadataCondition, ...]
    attention_mode: AttentionMode
    sampling: Sampling
    timeout_ms: int
    max_context_tokens: int
    """0: only the model's own limit counts."""
    given: tuple[rag_pb2.GivenPassage, ...]
    """Passages that the caller brought; when there are any, nothing is retrieved."""
    compression: CompressionRequest | None = None
    """None: off."""
    needs_compressor: bool = False
    """Whether its plan takes more than the passages' sizes."""
    turns: tuple[common_pb2.Turn, ...] = ()
    """The conversation before it, oldest first."""
    instructions: str = ""
    """What the caller asks of every answer."""


def check_generate(request: rag_pb2.GenerateRequest, limits: GatewaySettings, ability: CompressionAbility) -> Question:
    """Raises ``InvalidRequestError`` naming the first field that cannot be; ``ability``: of the server's bundle."""
    text = check_question("question", request.question, limits.max_question_chars)
    modes = (common_pb2.ATTENTION_MODE_BLOCK, common_pb2.ATTENTION_MODE_FULL, common_pb2.ATTENTION_MODE_NONE)
    mode = request.attention_mode or common_pb2.ATTENTION_MODE_BLOCK
    if mode not in modes:
        raise InvalidRequestError("attention_mode", f"unknown value {mode}")
    given = _check_given(request.passages, limits.max_top_k)
    if given and mode == common_pb2.ATTENTION_MODE_NONE:
        raise InvalidRequestError("passages", "cannot be given with attention_mode none, which uses no passages")
    if request.HasField("max_context_tokens") and request.max_context_tokens == 0:
        raise InvalidRequestError("max_context_tokens", "must be at least 1; leave it out for no limit")
    most_ms = limits.max_timeout_ms
    compression = read_compression(_compression(request, mode, limits), mode, ability)
    return Question(
        text=text,
        collection=check_collection(request.collection),
        top_k=_number(request, "top_k", limits.default_top_k, limits.max_top_k),
        filter=read_filter(request.filter),
        attention_mode=mode,
        sampling=_check_sampling(request, limits),
        timeout_ms=min(_number(request, "timeout_ms", most_ms, 2**32), most_ms),
        max_context_tokens=request.max_context_tokens,
        given=given,
        compression=compression,
        needs_compressor=not sizes_decide(compression, ability),
        turns=_check_conversation(request),
        instructions=normalise(request.instructions).strip(),
    )


def check_default_rate(limits: GatewaySettings, ability: CompressionAbility) -> None:
    """Raises ``SettingsError`` for a ``default_rate`` that the bundle does not have."""
    try:
        read_compression(_default_compression(limits), common_pb2.ATTENTION_MODE_BLOCK, ability)
    except InvalidRequestError as error:
        raise SettingsError(f"gateway.default_rate {error.problem}") from error


def _compression(
    request: rag_pb2.GenerateRequest, mode: common_pb2.AttentionMode, limits: GatewaySettings
) -> common_pb2.Compression:
    """What the request says, or the settings where it says nothing."""
    asked = request.HasField("compression") or mode != common_pb2.ATTENTION_MODE_BLOCK
    return request.compression if asked else _default_compression(limits)


def _default_compression(limits: GatewaySettings) -> common_pb2.Compression:
    if limits.default_rate == "auto":
        return common_pb2.Compression(auto=True)
    return common_pb2.Compression(rate=limits.default_rate) if limits.default_rate > 1 else common_pb2.Compression()


def check_retrieve(request: rag_pb2.RetrieveRequest, limits: GatewaySettings) -> SearchRequest:
    """What the retriever is asked, with every default filled in but for the context.

    Raises ``InvalidRequestError`` naming the first field that cannot be.
    """
    return SearchRequest(
        query=check_question("query", request.query, limits.max_question_chars),
        collection=check_collection(request.collection),
        top_k=_number(request, "top_k", limits.default_top_k, limits.max_top_k),
        filter=read_filter(request.filter),
    )


def check_question(field: str, text: str, max_chars: int) -> str:
    """A question with something in it, normalised, without control characters."""
    if len(text) > max_chars:
        raise InvalidRequestError(field, f"has {len(text)} characters; at most {max_chars} are allowed")
    check_text(field, text)
    text = normalise(text).strip()
    if is_blank(text):
        raise InvalidRequestError(field, "must not be empty")
    return text


def check_collection(name: str) -> str:
    """A collection's name; the empty one means the default."""
    if not name:
        return DEFAULT_COLLECTION
    check_collection_name(name)
    return name


def check_header(header: corpus_pb2.DocumentHeader) -> corpus_pb2.DocumentHeader:
    """The header normalised, with its collection filled in."""
    check_line("title", header.title, MAX_TITLE_CHARS)
    for key in header.metadata.fields:
        check_key("metadata", key)
    metadata_of(header.metadata)
    checked = corpus_pb2.DocumentHeader()
    # The metadata's own texts are normalised with those that the file brings (checked_metadata).
    checked.CopyFrom(header)
    checked.collection = check_collection(header.collection)
    checked.document_id = read_document_id(header.document_id)
    checked.title = normalise(header.title)
    checked.source = normalise(header.source) or checked.document_id
    check_line("source", checked.source, MAX_SOURCE_CHARS)
    if header.language and header.language not in LANGUAGES:
        raise InvalidRequestError("language", f"{header.language[:80]!r} is none of {', '.join(LANGUAGES)}")
    return checked


def check_source(source: str) -> str:
    """What documents came from, by which they are removed; normalised as it is stored."""
    if not source:
        raise InvalidRequestError("source", "must not be empty")
    check_line("source", source, MAX_SOURCE_CHARS)
    return normalise(source)


def read_document_id(document_id: str) -> str:
    """An id, normalised as ids are stored."""
    document_id = normalise(document_id)
    check_document_id(document_id)
    return document_id


def read_filter(conditions: Sequence[MetadataCondition]) -> tuple[MetadataCondition, ...]:
    """Conditions that can be evaluated, normalised as metadata is."""
    check_filter(conditions)
    return tuple(map(_normalised, conditions))


def check_page_size(page_size: int) -> int:
    """Entries of a page."""
    if page_size > MAX_PAGE:
        raise InvalidRequestError("page_size", f"is {page_size}; at most {MAX_PAGE} are allowed")
    return page_size or DEFAULT_PAGE


def check_document_ids(document_ids: Sequence[str], most: int = MAX_WARM_DOCUMENTS) -> tuple[str, ...]:
    """Ids without repetition, normalised, in order."""
    if len(document_ids) > most:
        raise InvalidRequestError("document_ids", f"at most {most} are allowed")
    return tuple(dict.fromkeys(map(read_document_id, document_ids)))


def check_trace_id(trace_id: str) -> str:
    """A trace's id in lower case."""
    if not _TRACE_ID.fullmatch(trace_id.lower()):
        raise InvalidRequestError("trace_id", "must be 32 hex digits")
    return trace_id.lower()


def _number(request: Message, field: str, default: int, most: int) -> int:
    """A number from 1 to ``most``, if the request has it."""
    if not request.HasField(field):
        return default
    number: int = getattr(request, field)
    if number == 0:
        raise InvalidRequestError(field, "must be at least 1")
    if number > most:
        raise InvalidRequestError(field, f"is {number}; at most {most} are allowed")
    return number


def _check_sampling(request: rag_pb2.GenerateRequest, limits: GatewaySettings) -> Sampling:
    max_tokens = _number(request, "max_tokens", limits.default_max_tokens, MAX_TOKENS)
    temperature = request.temperature if request.HasField("temperature") else 0.0
    if not 0.0 <= temperature <= MAX_TEMPERATURE:  # refuses NaN as well
        raise InvalidRequestError("temperature", f"must be between 0 and {MAX_TEMPERATURE:g}")
    top_p = request.top_p if request.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequestError("top_p", "must be above 0 and at most 1")
    if len(request.stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"has {len(request.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
    for index, stop in enumerate(request.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequestError(f"stop[{index}]", f"must have 1 to {MAX_STOP_CHARS} characters")
        check_text(f"stop[{index}]", stop)
    # 53 bits: a drawn seed survives a client whose numbers are doubles.
    seed = request.seed if request.HasField("seed") else secrets.randbits(53)
    return Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=request.stop)


def _check_given(passages: Sequence[rag_pb2.GivenPassage], most: int) -> tuple[rag_pb2.GivenPassage, ...]:
    if len(passages) > most:
        raise InvalidRequestError("passages", f"has {len(passages)} passages; at most {most} are allowed")
    for index, passage in enumerate(passages):
        field = f"passages[{index}]"
        if len(passage.text) > MAX_GIVEN_CHARS:
            raise InvalidRequestError(f"{field}.text", f"has more than {MAX_GIVEN_CHARS} characters")
        check_text(f"{field}.text", passage.text)
        if is_blank(passage.text):
            raise InvalidRequestError(f"{field}.text", "must not be empty")
        check_line(f"{field}.title", passage.title, MAX_TITLE_CHARS)
    total = sum(len(passage.text) for passage in passages)
    if total > MAX_GIVEN_TOTAL_CHARS:
        raise InvalidRequestError(
            "passages", f"have {total} characters together; at most {MAX_GIVEN_TOTAL_CHARS} are allowed"
        )
    return tuple(
        rag_pb2.GivenPassage(title=normalise(passage.title), text=normalise(passage.text)) for passage in passages
    )


def _normalised(condition: MetadataCondition) -> MetadataCondition:
    checked = MetadataCondition()
    checked.CopyFrom(condition)
    checked.key = normalise(condition.key)
    for value in checked.values:
        if value.WhichOneof("kind") == "string_value":
            value.string_value = normalise(value.string_value)
    return checked


def _check_conversation(request: rag_pb2.GenerateRequest) -> tuple[common_pb2.Turn, ...]:
    if len(request.turns) > MAX_TURNS:
        raise InvalidRequestError("turns", f"has {len(request.turns)} turns; at most {MAX_TURNS} are allowed")
    total = len(request.instructions) + sum(len(turn.question) + len(turn.answer) for turn in request.turns)
    if total > MAX_CONVERSATION_CHARS:
        raise InvalidRequestError(
            "turns", f"and instructions have {total} characters together; at most {MAX_CONVERSATION_CHARS} are allowed"
        )
    check_text("instructions", request.instructions)
    for index, turn in enumerate(request.turns):
        check_text(f"turns[{index}].question", turn.question)
        check_text(f"turns[{index}].answer", turn.answer)
        if is_blank(turn.question):
            raise InvalidRequestError(f"turns[{index}].question", "must not be empty")
    # Answers too: equal turns are one block of the cache.
    return tuple(
        common_pb2.Turn(question=normalise(turn.question), answer=normalise(turn.answer)) for turn in request.turns
    )
