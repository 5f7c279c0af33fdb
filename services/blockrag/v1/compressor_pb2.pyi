from blockrag.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PlanRequest(_message.Message):
    __slots__ = ("context", "question", "passages", "attention_mode", "max_context_tokens", "max_tokens", "compression", "spent_ms", "margin_ms", "collection", "turns", "instructions", "language")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    SPENT_MS_FIELD_NUMBER: _ClassVar[int]
    MARGIN_MS_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    question: str
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    attention_mode: _common_pb2.AttentionMode
    max_context_tokens: int
    max_tokens: int
    compression: _common_pb2.Compression
    spent_ms: float
    margin_ms: float
    collection: str
    turns: _containers.RepeatedCompositeFieldContainer[_common_pb2.Turn]
    instructions: str
    language: str
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., question: _Optional[str] = ..., passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ..., attention_mode: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., max_context_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., compression: _Optional[_Union[_common_pb2.Compression, _Mapping]] = ..., spent_ms: _Optional[float] = ..., margin_ms: _Optional[float] = ..., collection: _Optional[str] = ..., turns: _Optional[_Iterable[_Union[_common_pb2.Turn, _Mapping]]] = ..., instructions: _Optional[str] = ..., language: _Optional[str] = ...) -> None: ...

class PassagePlan(_message.Message):
    __slots__ = ("passage_id", "document_id", "token_ids", "chunks", "in_prompt", "dropped_reason")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    IN_PROMPT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_REASON_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    document_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    chunks: _containers.RepeatedCompositeFieldContainer[_common_pb2.ChunkDecision]
    in_prompt: bool
    dropped_reason: str
    def __init__(self, passage_id: _Optional[str] = ..., document_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., chunks: _Optional[_Iterable[_Union[_common_pb2.ChunkDecision, _Mapping]]] = ..., in_prompt: _Optional[bool] = ..., dropped_reason: _Optional[str] = ...) -> None: ...

class PlanResponse(_message.Message):
    __slots__ = ("instruction_token_ids", "passages", "final_token_ids", "prompt_tokens", "chunk_tokens", "policy_ms", "turns", "expected_ms")
    INSTRUCTION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    FINAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POLICY_MS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    instruction_token_ids: _containers.RepeatedScalarFieldContainer[int]
    passages: _containers.RepeatedCompositeFieldContainer[PassagePlan]
    final_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    chunk_tokens: int
    policy_ms: float
    turns: _containers.RepeatedCompositeFieldContainer[_common_pb2.PromptBlock]
    expected_ms: float
    def __init__(self, instruction_token_ids: _Optional[_Iterable[int]] = ..., passages: _Optional[_Iterable[_Union[PassagePlan, _Mapping]]] = ..., final_token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., policy_ms: _Optional[float] = ..., turns: _Optional[_Iterable[_Union[_common_pb2.PromptBlock, _Mapping]]] = ..., expected_ms: _Optional[float] = ...) -> None: ...

class PrepareQuestionRequest(_message.Message):
    __slots__ = ("context", "question")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    question: str
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., question: _Optional[str] = ...) -> None: ...

class PrepareQuestionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizePassagesRequest(_message.Message):
    __slots__ = ("context", "passages")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ...) -> None: ...

class TokenizedPassage(_message.Message):
    __slots__ = ("passage_id", "document_id", "token_ids")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    document_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, passage_id: _Optional[str] = ..., document_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenizePassagesResponse(_message.Message):
    __slots__ = ("instruction_token_ids", "passages")
    INSTRUCTION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    instruction_token_ids: _containers.RepeatedScalarFieldContainer[int]
    passages: _containers.RepeatedCompositeFieldContainer[TokenizedPassage]
    def __init__(self, instruction_token_ids: _Optional[_Iterable[int]] = ..., passages: _Optional[_Iterable[_Union[TokenizedPassage, _Mapping]]] = ...) -> None: ...
