from blockrag.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetKvCacheStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TenantUsage(_message.Message):
    __slots__ = ("tenant", "blocks", "bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    blocks: int
    bytes: int
    def __init__(self, tenant: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class FormUsage(_message.Message):
    __slots__ = ("form", "blocks", "bytes", "hits", "misses")
    FORM_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    form: str
    blocks: int
    bytes: int
    hits: int
    misses: int
    def __init__(self, form: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ...) -> None: ...

class DiskUsage(_message.Message):
    __slots__ = ("blocks", "bytes", "budget_bytes", "hits", "slower", "written", "evictions", "rejected", "dropped", "pending", "warnings")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    SLOWER_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    budget_bytes: int
    hits: int
    slower: int
    written: int
    evictions: int
    rejected: int
    dropped: int
    pending: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., slower: _Optional[int] = ..., written: _Optional[int] = ..., evictions: _Optional[int] = ..., rejected: _Optional[int] = ..., dropped: _Optional[int] = ..., pending: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class GetKvCacheStatusResponse(_message.Message):
    __slots__ = ("blocks", "bytes", "budget_bytes", "pinned_blocks", "hits", "misses", "joined", "evictions", "expirations", "lost", "shards", "tenants", "forms", "disk")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    EXPIRATIONS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    budget_bytes: int
    pinned_blocks: int
    hits: int
    misses: int
    joined: int
    evictions: int
    expirations: int
    lost: int
    shards: int
    tenants: _containers.RepeatedCompositeFieldContainer[TenantUsage]
    forms: _containers.RepeatedCompositeFieldContainer[FormUsage]
    disk: DiskUsage
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., joined: _Optional[int] = ..., evictions: _Optional[int] = ..., expirations: _Optional[int] = ..., lost: _Optional[int] = ..., shards: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[TenantUsage, _Mapping]]] = ..., forms: _Optional[_Iterable[_Union[FormUsage, _Mapping]]] = ..., disk: _Optional[_Union[DiskUsage, _Mapping]] = ...) -> None: ...

class DocumentRef(_message.Message):
    __slots__ = ("collection", "document_id")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    collection: str
    document_id: str
    def __init__(self, collection: _Optional[str] = ..., document_id: _Optional[str] = ...) -> None: ...

class SetPinsRequest(_message.Message):
    __slots__ = ("context", "documents", "pinned")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    documents: _containers.RepeatedCompositeFieldContainer[DocumentRef]
    pinned: bool
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., documents: _Optional[_Iterable[_Union[DocumentRef, _Mapping]]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class SetPinsResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class PurgeDocumentsRequest(_message.Message):
    __slots__ = ("context", "documents")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    documents: _containers.RepeatedCompositeFieldContainer[DocumentRef]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., documents: _Optional[_Iterable[_Union[DocumentRef, _Mapping]]] = ...) -> None: ...

class PurgeDocumentsResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class WarmBlocksRequest(_message.Message):
    __slots__ = ("context", "blocks", "pin", "forms")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    blocks: _containers.RepeatedCompositeFieldContainer[_common_pb2.PromptBlock]
    pin: bool
    forms: _containers.RepeatedScalarFieldContainer[_common_pb2.BlockForm]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[_common_pb2.PromptBlock, _Mapping]]] = ..., pin: _Optional[bool] = ..., forms: _Optional[_Iterable[_Union[_common_pb2.BlockForm, str]]] = ...) -> None: ...

class WarmBlocksResponse(_message.Message):
    __slots__ = ("hits", "encoded", "encoded_bytes", "over_budget")
    HITS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    OVER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    hits: int
    encoded: int
    encoded_bytes: int
    over_budget: bool
    def __init__(self, hits: _Optional[int] = ..., encoded: _Optional[int] = ..., encoded_bytes: _Optional[int] = ..., over_budget: _Optional[bool] = ...) -> None: ...
