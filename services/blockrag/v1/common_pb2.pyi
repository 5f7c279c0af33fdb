from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttentionMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTENTION_MODE_UNSPECIFIED: _ClassVar[AttentionMode]
    ATTENTION_MODE_BLOCK: _ClassVar[AttentionMode]
    ATTENTION_MODE_FULL: _ClassVar[AttentionMode]
    ATTENTION_MODE_NONE: _ClassVar[AttentionMode]

class ChunkForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHUNK_FORM_UNSPECIFIED: _ClassVar[ChunkForm]
    CHUNK_FORM_EXPANDED: _ClassVar[ChunkForm]
    CHUNK_FORM_COMPRESSED: _ClassVar[ChunkForm]
    CHUNK_FORM_DROPPED: _ClassVar[ChunkForm]

class BlockForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_FORM_UNSPECIFIED: _ClassVar[BlockForm]
    BLOCK_FORM_FULL: _ClassVar[BlockForm]
    BLOCK_FORM_COMPRESSED: _ClassVar[BlockForm]
    BLOCK_FORM_CHUNKS: _ClassVar[BlockForm]

class ConditionOperator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONDITION_OPERATOR_UNSPECIFIED: _ClassVar[ConditionOperator]
    CONDITION_OPERATOR_IN: _ClassVar[ConditionOperator]
    CONDITION_OPERATOR_NOT_IN: _ClassVar[ConditionOperator]
    CONDITION_OPERATOR_AT_LEAST: _ClassVar[ConditionOperator]
    CONDITION_OPERATOR_AT_MOST: _ClassVar[ConditionOperator]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_END: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ATTENTION_MODE_UNSPECIFIED: AttentionMode
ATTENTION_MODE_BLOCK: AttentionMode
ATTENTION_MODE_FULL: AttentionMode
ATTENTION_MODE_NONE: AttentionMode
CHUNK_FORM_UNSPECIFIED: ChunkForm
CHUNK_FORM_EXPANDED: ChunkForm
CHUNK_FORM_COMPRESSED: ChunkForm
CHUNK_FORM_DROPPED: ChunkForm
BLOCK_FORM_UNSPECIFIED: BlockForm
BLOCK_FORM_FULL: BlockForm
BLOCK_FORM_COMPRESSED: BlockForm
BLOCK_FORM_CHUNKS: BlockForm
CONDITION_OPERATOR_UNSPECIFIED: ConditionOperator
CONDITION_OPERATOR_IN: ConditionOperator
CONDITION_OPERATOR_NOT_IN: ConditionOperator
CONDITION_OPERATOR_AT_LEAST: ConditionOperator
CONDITION_OPERATOR_AT_MOST: ConditionOperator
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_END: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class RequestContext(_message.Message):
    __slots__ = ("request_id", "tenant", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Compression(_message.Message):
    __slots__ = ("rate", "max_context_tokens", "max_ttft_ms", "auto", "policy")
    RATE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    rate: float
    max_context_tokens: int
    max_ttft_ms: float
    auto: bool
    policy: str
    def __init__(self, rate: _Optional[float] = ..., max_context_tokens: _Optional[int] = ..., max_ttft_ms: _Optional[float] = ..., auto: _Optional[bool] = ..., policy: _Optional[str] = ...) -> None: ...

class MetadataCondition(_message.Message):
    __slots__ = ("key", "operator", "values")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    key: str
    operator: ConditionOperator
    values: _containers.RepeatedCompositeFieldContainer[_struct_pb2.Value]
    def __init__(self, key: _Optional[str] = ..., operator: _Optional[_Union[ConditionOperator, str]] = ..., values: _Optional[_Iterable[_Union[_struct_pb2.Value, _Mapping]]] = ...) -> None: ...

class Passage(_message.Message):
    __slots__ = ("passage_id", "document_id", "document_version", "ordinal", "title", "text", "metadata", "score", "also_in")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ALSO_IN_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    document_id: str
    document_version: str
    ordinal: int
    title: str
    text: str
    metadata: _struct_pb2.Struct
    score: float
    also_in: _containers.RepeatedCompositeFieldContainer[PassageHolder]
    def __init__(self, passage_id: _Optional[str] = ..., document_id: _Optional[str] = ..., document_version: _Optional[str] = ..., ordinal: _Optional[int] = ..., title: _Optional[str] = ..., text: _Optional[str] = ..., metadata: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., score: _Optional[float] = ..., also_in: _Optional[_Iterable[_Union[PassageHolder, _Mapping]]] = ...) -> None: ...

class PassageHolder(_message.Message):
    __slots__ = ("passage_id", "document_id", "title")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    document_id: str
    title: str
    def __init__(self, passage_id: _Optional[str] = ..., document_id: _Optional[str] = ..., title: _Optional[str] = ...) -> None: ...

class ChunkDecision(_message.Message):
    __slots__ = ("start_token", "end_token", "form", "text")
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    start_token: int
    end_token: int
    form: ChunkForm
    text: str
    def __init__(self, start_token: _Optional[int] = ..., end_token: _Optional[int] = ..., form: _Optional[_Union[ChunkForm, str]] = ..., text: _Optional[str] = ...) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("stage", "milliseconds")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    milliseconds: float
    def __init__(self, stage: _Optional[str] = ..., milliseconds: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "l1_tokens", "store_tokens", "encoded_tokens", "prefill_tokens", "completion_tokens", "context_tokens", "compressed_chunks", "disk_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    L1_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    l1_tokens: int
    store_tokens: int
    encoded_tokens: int
    prefill_tokens: int
    completion_tokens: int
    context_tokens: int
    compressed_chunks: int
    disk_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., l1_tokens: _Optional[int] = ..., store_tokens: _Optional[int] = ..., encoded_tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., compressed_chunks: _Optional[int] = ..., disk_tokens: _Optional[int] = ...) -> None: ...

class BlockSlots(_message.Message):
    __slots__ = ("l1", "store", "disk", "encoded")
    L1_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    l1: int
    store: int
    disk: int
    encoded: int
    def __init__(self, l1: _Optional[int] = ..., store: _Optional[int] = ..., disk: _Optional[int] = ..., encoded: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "seed", "stop")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("question", "answer")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    question: str
    answer: str
    def __init__(self, question: _Optional[str] = ..., answer: _Optional[str] = ...) -> None: ...

class PromptBlock(_message.Message):
    __slots__ = ("token_ids", "document_id", "collection", "chunk_tokens", "forms", "kept")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    document_id: str
    collection: str
    chunk_tokens: int
    forms: _containers.RepeatedScalarFieldContainer[ChunkForm]
    kept: _containers.RepeatedCompositeFieldContainer[TokenSpan]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., document_id: _Optional[str] = ..., collection: _Optional[str] = ..., chunk_tokens: _Optional[int] = ..., forms: _Optional[_Iterable[_Union[ChunkForm, str]]] = ..., kept: _Optional[_Iterable[_Union[TokenSpan, _Mapping]]] = ...) -> None: ...

class TokenSpan(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...
