"""What ``blockrag.client`` gives back, frozen, without a protobuf message in it; and what questions are asked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

AttentionModeName = Literal["block", "full", "none"]
FinishReasonName = Literal["end", "stop", "length"]
IngestOutcomeName = Literal["created", "replaced", "unchanged"]
ChunkFormName = Literal["expanded", "compressed", "dropped"]


@dataclass(frozen=True)
class PassageHolder:
    """A passage with the same text in another document."""

    passage_id: str
    document_id: str
    title: str


@dataclass(frozen=True)
class Passage:
    """A piece of a document, as retrieved."""

    passage_id: str
    document_id: str
    """Empty for a passage that the caller gave."""
    document_version: str
    ordinal: int
    title: str
    text: str
    metadata: Mapping[str, Any]
    score: float
    """Fused retrieval score; comparable within one answer only."""
    also_in: tuple[PassageHolder, ...] = ()
    """The other documents that hold the same text."""


@dataclass(frozen=True)
class Retrieved:
    """First event of an answer."""

    passages: tuple[Passage, ...]
    """Best first."""


class TextChunk(str):
    """A piece of an answer: text, and how many tokens it stands for."""

    __slots__ = ("tokens",)
    tokens: int

    def __new__(cls, text: str, tokens: int = 0) -> TextChunk:
        chunk = super().__new__(cls, text)
        chunk.tokens = tokens
        return chunk


@dataclass(frozen=True)
class CitedChunk:
    """What became of one chunk of a passage; tokens counted within the passage's block."""

    start_token: int
    end_token: int
    form: ChunkFormName
    text: str = ""
    """Its words; empty unless the question asked for compression."""


@dataclass(frozen=True)
class BlockSlots:
    """Slots of one block in a prompt, by where they were found."""

    l1: int = 0
    """In the decoder's own memory."""
    store: int = 0
    disk: int = 0
    encoded: int = 0
    """For this request."""


@dataclass(frozen=True)
class Citation:
    """What of one retrieved passage was in the prompt."""

    index: int
    """Place among the retrieved passages, from 0."""
    passage_id: str
    document_id: str
    title: str
    tokens: int
    in_prompt: bool
    dropped_reason: str
    """Empty when in the prompt."""
    chunks: tuple[CitedChunk, ...]
    also_in: tuple[PassageHolder, ...] = ()
    """The other documents that hold the same text."""
    slots: BlockSlots = BlockSlots()
    """Its slots in the prompt; none where it is not composed from cached blocks."""
    place: int = 0
    """Its place among the passages of the prompt, from 1; 0: it is not in it."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer; of the prompt, slots: a compressed chunk is one."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in a cache: ``l1_tokens``, ``store_tokens`` and ``disk_tokens`` together."""
    l1_tokens: int
    store_tokens: int
    encoded_tokens: int
    prefill_tokens: int
    completion_tokens: int
    context_tokens: int = 0
    """Of the passages in the prompt, before compression."""
    compressed_chunks: int = 0
    """Chunks of passages that take one slot each."""
    disk_tokens: int = 0
    """Of the prompt, read from disk."""


@dataclass(frozen=True)
class Completion:
    """Last event of an answer."""

    request_id: str
    answer: str
    citations: tuple[Citation, ...]
    """One for each retrieved passage."""
    usage: Usage
    stages_ms: Mapping[str, float]
    """retrieve, plan, queue, kv_fetch, compose, prefill, decode, total."""
    finish_reason: FinishReasonName
    time_to_first_token_ms: float
    """In the server, from receiving the request to its first text."""
    seed: int
    bundle_fingerprint: str
    attention_mode: AttentionModeName
    trace_id: str
    instruction_slots: BlockSlots = BlockSlots()
    """Of the template's own instructions."""
    turn_slots: tuple[BlockSlots, ...] = ()
    """Of the caller's instructions, if there are any, and of each turn."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    passages: tuple[Passage, ...]
    completion: Completion
    client_time_to_first_token_ms: float
    """As the client saw it; 0 when there was no text."""


@dataclass(frozen=True)
class Condition:
    """One condition of a filter on documents' metadata."""

    key: str
    """Keys of objects within are joined by dots: ``author.name``."""
    operator: Literal["in", "not_in", "at_least", "at_most"]
    values: tuple[str | float | bool, ...]
    """A number equals no text: 7 is not "7"."""


@dataclass(frozen=True)
class Compression:
    """How small the passages are to become in the prompt: exactly one budget.

    Chunks of passages are read word for word while the budget lasts, and as one slot each beyond it.
    """

    rate: float | Literal["auto"] | None = None
    """Passage tokens per slot: from 1 (everything word for word) to the tokens of the bundle's chunks. "auto": as few
    whole passages as the question seems to need."""
    max_context_tokens: int | None = None
    """Most slots of the passages."""
    max_ttft_ms: float | None = None
    """Most milliseconds until the first token, as the server expects them."""
    policy: str = ""
    """Who chooses what is read word for word: query, blind or retrieval; empty: the best that the bundle has."""


@dataclass(frozen=True)
class GivenPassage:
    """A passage that the caller found itself."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class IngestedDocument:
    """One stored document."""

    document_id: str
    version: str
    passages: int
    outcome: IngestOutcomeName


@dataclass(frozen=True)
class DeletedDocument:
    """What a deletion removed."""

    passages: int
    purged_blocks: int


@dataclass(frozen=True)
class DeletedSource:
    """What a deletion removed."""

    document_ids: tuple[str, ...]
    passages: int
    purged_blocks: int


@dataclass(frozen=True)
class DeletedCollection:
    """What a deletion removed."""

    documents: int
    passages: int
    purged_blocks: int


@dataclass(frozen=True)
class Document:
    """A stored document."""

    document_id: str
    version: str
    title: str
    passages: int
    metadata: Mapping[str, Any]
    source: str = ""
    """What it came from."""


@dataclass(frozen=True)
class Collection:
    """A collection."""

    name: str
    documents: int
    passages: int
    language: str = ""
    """Whose words BM25 reduces to stems."""


@dataclass(frozen=True)
class WarmProgress:
    """How far a warming is."""

    done: int
    total: int
    hits: int
    """Of those done, in the cache already."""
    encoded_bytes: int
    over_budget: bool
    """The cache's budget does not hold all of it; what was done first is warm, the rest was left."""


@dataclass(frozen=True)
class ServiceHealth:
    """One service's state."""

    name: str
    healthy: bool
    detail: str
    milliseconds: float


@dataclass(frozen=True)
class Description:
    """The running system."""

    version: str
    bundle_name: str
    bundle_fingerprint: str
    max_positions: int
    max_top_k: int
    max_question_chars: int
    max_document_bytes: int
    services: tuple[ServiceHealth, ...]
    retriever: Mapping[str, Any]
    """Fields of GetRetrieverStatusResponse; so below, for each service's own."""
    encoder: Mapping[str, Any]
    kv_cache: Mapping[str, Any]
    decoder: Mapping[str, Any]
    chunk_tokens: int = 0
    """Tokens of a chunk: the highest rate of a compression."""
    compresses_chunks: bool = False
    """False: a compression leaves whole passages out."""
    tenants: tuple[Mapping[str, Any], ...] = ()
    """Fields of TenantQuotas: what the caller, or for an operator everybody, uses of its limits."""

    @property
    def healthy(self) -> bool:
        """Whether every service answered."""
        return all(service.healthy for service in self.services)


@dataclass(frozen=True)
class TraceSpan:
    """One finished span."""

    span_id: str
    parent_span_id: str
    """Empty: a root."""
    name: str
    service: str
    start_unix_ns: int
    end_unix_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def milliseconds(self) -> float:
        """How long it took."""
        return (self.end_unix_ns - self.start_unix_ns) / 1e6


Scalar = str | float | bool
Filter = Mapping[str, Scalar | Sequence[Scalar]] | Sequence[Condition]
"""Conditions, or fields and the value that each must have; of several in a list, one."""


class GenerateOptions(TypedDict, total=False):
    """Options of a question; what is left out is the server's default."""

    collection: str
    top_k: int
    filter: Filter
    attention_mode: AttentionModeName
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | Sequence[str]
    timeout_s: float
    max_context_tokens: int
    passages: Sequence[GivenPassage]
    compression: Compression
    turns: Sequence[tuple[str, str]]
    """Earlier questions and their answers, oldest first."""
    instructions: str
    """What is asked of every answer."""


class IngestOptions(TypedDict, total=False):
    """Options of an ingest; what is left out is empty, or the server's default."""

    collection: str
    title: str
    media_type: str
    metadata: Mapping[str, Any]
    source: str
    """What the document comes from, for ``delete_source``; left out: the document's id."""
    language: str
    """Of a new collection, see ``blockrag.languages``; left out: the server's default."""
    dry_run: bool
    """Store nothing and say what would be stored."""
