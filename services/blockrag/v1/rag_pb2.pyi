from blockrag.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GivenPassage(_message.Message):
    __slots__ = ("title", "text")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    title: str
    text: str
    def __init__(self, title: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("question", "collection", "top_k", "filter", "attention_mode", "max_tokens", "temperature", "top_p", "seed", "stop", "timeout_ms", "max_context_tokens", "passages", "compression", "turns", "instructions")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    question: str
    collection: str
    top_k: int
    filter: _containers.RepeatedCompositeFieldContainer[_common_pb2.MetadataCondition]
    attention_mode: _common_pb2.AttentionMode
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    timeout_ms: int
    max_context_tokens: int
    passages: _containers.RepeatedCompositeFieldContainer[GivenPassage]
    compression: _common_pb2.Compression
    turns: _containers.RepeatedCompositeFieldContainer[_common_pb2.Turn]
    instructions: str
    def __init__(self, question: _Optional[str] = ..., collection: _Optional[str] = ..., top_k: _Optional[int] = ..., filter: _Optional[_Iterable[_Union[_common_pb2.MetadataCondition, _Mapping]]] = ..., attention_mode: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., timeout_ms: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., passages: _Optional[_Iterable[_Union[GivenPassage, _Mapping]]] = ..., compression: _Optional[_Union[_common_pb2.Compression, _Mapping]] = ..., turns: _Optional[_Iterable[_Union[_common_pb2.Turn, _Mapping]]] = ..., instructions: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "retrieved", "text", "completion")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RETRIEVED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    retrieved: Retrieved
    text: TextChunk
    completion: Completion
    def __init__(self, request_id: _Optional[str] = ..., retrieved: _Optional[_Union[Retrieved, _Mapping]] = ..., text: _Optional[_Union[TextChunk, _Mapping]] = ..., completion: _Optional[_Union[Completion, _Mapping]] = ...) -> None: ...

class Retrieved(_message.Message):
    __slots__ = ("passages",)
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    def __init__(self, passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ...) -> None: ...

class TextChunk(_message.Message):
    __slots__ = ("text", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: int
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class Citation(_message.Message):
    __slots__ = ("index", "passage_id", "document_id", "title", "chunks", "tokens", "in_prompt", "dropped_reason", "also_in", "slots", "place")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    IN_PROMPT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_REASON_FIELD_NUMBER: _ClassVar[int]
    ALSO_IN_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    index: int
    passage_id: str
    document_id: str
    title: str
    chunks: _containers.RepeatedCompositeFieldContainer[_common_pb2.ChunkDecision]
    tokens: int
    in_prompt: bool
    dropped_reason: str
    also_in: _containers.RepeatedCompositeFieldContainer[_common_pb2.PassageHolder]
    slots: _common_pb2.BlockSlots
    place: int
    def __init__(self, index: _Optional[int] = ..., passage_id: _Optional[str] = ..., document_id: _Optional[str] = ..., title: _Optional[str] = ..., chunks: _Optional[_Iterable[_Union[_common_pb2.ChunkDecision, _Mapping]]] = ..., tokens: _Optional[int] = ..., in_prompt: _Optional[bool] = ..., dropped_reason: _Optional[str] = ..., also_in: _Optional[_Iterable[_Union[_common_pb2.PassageHolder, _Mapping]]] = ..., slots: _Optional[_Union[_common_pb2.BlockSlots, _Mapping]] = ..., place: _Optional[int] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("answer", "citations", "usage", "stages", "finish_reason", "time_to_first_token_ms", "seed", "bundle_fingerprint", "attention_mode", "trace_id", "instruction_slots", "turn_slots")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CITATIONS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MODE_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TURN_SLOTS_FIELD_NUMBER: _ClassVar[int]
    answer: str
    citations: _containers.RepeatedCompositeFieldContainer[Citation]
    usage: _common_pb2.Usage
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.StageTime]
    finish_reason: _common_pb2.FinishReason
    time_to_first_token_ms: float
    seed: int
    bundle_fingerprint: str
    attention_mode: _common_pb2.AttentionMode
    trace_id: str
    instruction_slots: _common_pb2.BlockSlots
    turn_slots: _containers.RepeatedCompositeFieldContainer[_common_pb2.BlockSlots]
    def __init__(self, answer: _Optional[str] = ..., citations: _Optional[_Iterable[_Union[Citation, _Mapping]]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.StageTime, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., time_to_first_token_ms: _Optional[float] = ..., seed: _Optional[int] = ..., bundle_fingerprint: _Optional[str] = ..., attention_mode: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., trace_id: _Optional[str] = ..., instruction_slots: _Optional[_Union[_common_pb2.BlockSlots, _Mapping]] = ..., turn_slots: _Optional[_Iterable[_Union[_common_pb2.BlockSlots, _Mapping]]] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("query", "collection", "top_k", "filter")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    query: str
    collection: str
    top_k: int
    filter: _containers.RepeatedCompositeFieldContainer[_common_pb2.MetadataCondition]
    def __init__(self, query: _Optional[str] = ..., collection: _Optional[str] = ..., top_k: _Optional[int] = ..., filter: _Optional[_Iterable[_Union[_common_pb2.MetadataCondition, _Mapping]]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("request_id", "passages", "stages")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.StageTime]
    def __init__(self, request_id: _Optional[str] = ..., passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.StageTime, _Mapping]]] = ...) -> None: ...
