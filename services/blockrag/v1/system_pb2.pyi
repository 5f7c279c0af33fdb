from blockrag.v1 import decoder_pb2 as _decoder_pb2
from blockrag.v1 import encoder_pb2 as _encoder_pb2
from blockrag.v1 import kv_cache_pb2 as _kv_cache_pb2
from blockrag.v1 import retriever_pb2 as _retriever_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("version", "bundle_fingerprint", "bundle_name", "max_positions", "max_top_k", "max_question_chars", "max_document_bytes", "services", "retriever", "encoder", "kv_cache", "decoder", "tenants", "chunk_tokens", "compresses_chunks")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_QUESTION_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_DOCUMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    RETRIEVER_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSES_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    version: str
    bundle_fingerprint: str
    bundle_name: str
    max_positions: int
    max_top_k: int
    max_question_chars: int
    max_document_bytes: int
    services: _containers.RepeatedCompositeFieldContainer[ServiceHealth]
    retriever: _retriever_pb2.GetRetrieverStatusResponse
    encoder: _encoder_pb2.GetEncoderStatusResponse
    kv_cache: _kv_cache_pb2.GetKvCacheStatusResponse
    decoder: _decoder_pb2.GetDecoderStatusResponse
    tenants: _containers.RepeatedCompositeFieldContainer[TenantQuotas]
    chunk_tokens: int
    compresses_chunks: bool
    def __init__(self, version: _Optional[str] = ..., bundle_fingerprint: _Optional[str] = ..., bundle_name: _Optional[str] = ..., max_positions: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_question_chars: _Optional[int] = ..., max_document_bytes: _Optional[int] = ..., services: _Optional[_Iterable[_Union[ServiceHealth, _Mapping]]] = ..., retriever: _Optional[_Union[_retriever_pb2.GetRetrieverStatusResponse, _Mapping]] = ..., encoder: _Optional[_Union[_encoder_pb2.GetEncoderStatusResponse, _Mapping]] = ..., kv_cache: _Optional[_Union[_kv_cache_pb2.GetKvCacheStatusResponse, _Mapping]] = ..., decoder: _Optional[_Union[_decoder_pb2.GetDecoderStatusResponse, _Mapping]] = ..., tenants: _Optional[_Iterable[_Union[TenantQuotas, _Mapping]]] = ..., chunk_tokens: _Optional[int] = ..., compresses_chunks: _Optional[bool] = ...) -> None: ...

class TenantQuotas(_message.Message):
    __slots__ = ("tenant", "quotas")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    def __init__(self, tenant: _Optional[str] = ..., quotas: _Optional[_Iterable[_Union[Quota, _Mapping]]] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("name", "used", "limit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    used: int
    limit: int
    def __init__(self, name: _Optional[str] = ..., used: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ServiceHealth(_message.Message):
    __slots__ = ("name", "healthy", "detail", "milliseconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    healthy: bool
    detail: str
    milliseconds: float
    def __init__(self, name: _Optional[str] = ..., healthy: _Optional[bool] = ..., detail: _Optional[str] = ..., milliseconds: _Optional[float] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("trace_id",)
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    trace_id: str
    def __init__(self, trace_id: _Optional[str] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("spans",)
    SPANS_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[TraceSpan]
    def __init__(self, spans: _Optional[_Iterable[_Union[TraceSpan, _Mapping]]] = ...) -> None: ...

class TraceSpan(_message.Message):
    __slots__ = ("span_id", "parent_span_id", "name", "service", "start_unix_ns", "end_unix_ns", "attributes", "error")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    END_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    parent_span_id: str
    name: str
    service: str
    start_unix_ns: int
    end_unix_ns: int
    attributes: _containers.ScalarMap[str, str]
    error: str
    def __init__(self, span_id: _Optional[str] = ..., parent_span_id: _Optional[str] = ..., name: _Optional[str] = ..., service: _Optional[str] = ..., start_unix_ns: _Optional[int] = ..., end_unix_ns: _Optional[int] = ..., attributes: _Optional[_Mapping[str, str]] = ..., error: _Optional[str] = ...) -> None: ...
