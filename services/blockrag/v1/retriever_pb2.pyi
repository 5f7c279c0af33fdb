from blockrag.v1 import common_pb2 as _common_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SearchRequest(_message.Message):
    __slots__ = ("context", "collection", "query", "top_k", "filter")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    query: str
    top_k: int
    filter: _containers.RepeatedCompositeFieldContainer[_common_pb2.MetadataCondition]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ..., query: _Optional[str] = ..., top_k: _Optional[int] = ..., filter: _Optional[_Iterable[_Union[_common_pb2.MetadataCondition, _Mapping]]] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("passages", "language")
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    language: str
    def __init__(self, passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ..., language: _Optional[str] = ...) -> None: ...

class AddPassagesRequest(_message.Message):
    __slots__ = ("context", "collection", "passages", "language")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    language: str
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ..., passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ..., language: _Optional[str] = ...) -> None: ...

class AddPassagesResponse(_message.Message):
    __slots__ = ("added",)
    ADDED_FIELD_NUMBER: _ClassVar[int]
    added: int
    def __init__(self, added: _Optional[int] = ...) -> None: ...

class CommitDocumentRequest(_message.Message):
    __slots__ = ("context", "collection", "document_id", "version", "title", "metadata", "passages", "source")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    document_id: str
    version: str
    title: str
    metadata: _struct_pb2.Struct
    passages: int
    source: str
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ..., document_id: _Optional[str] = ..., version: _Optional[str] = ..., title: _Optional[str] = ..., metadata: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., passages: _Optional[int] = ..., source: _Optional[str] = ...) -> None: ...

class CommitDocumentResponse(_message.Message):
    __slots__ = ("replaced_version",)
    REPLACED_VERSION_FIELD_NUMBER: _ClassVar[int]
    replaced_version: str
    def __init__(self, replaced_version: _Optional[str] = ...) -> None: ...

class RemoveDocumentRequest(_message.Message):
    __slots__ = ("context", "collection", "document_id")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    document_id: str
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ..., document_id: _Optional[str] = ...) -> None: ...

class RemoveDocumentResponse(_message.Message):
    __slots__ = ("passages",)
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    passages: int
    def __init__(self, passages: _Optional[int] = ...) -> None: ...

class RemoveCollectionRequest(_message.Message):
    __slots__ = ("context", "collection")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ...) -> None: ...

class RemoveCollectionResponse(_message.Message):
    __slots__ = ("documents", "passages")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    documents: int
    passages: int
    def __init__(self, documents: _Optional[int] = ..., passages: _Optional[int] = ...) -> None: ...

class ScanDocumentsRequest(_message.Message):
    __slots__ = ("context", "collection", "after_document_id", "limit", "document_ids")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    AFTER_DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    after_document_id: str
    limit: int
    document_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ..., after_document_id: _Optional[str] = ..., limit: _Optional[int] = ..., document_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class StoredDocument(_message.Message):
    __slots__ = ("document_id", "version", "title", "passages", "metadata", "source")
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    version: str
    title: str
    passages: int
    metadata: _struct_pb2.Struct
    source: str
    def __init__(self, document_id: _Optional[str] = ..., version: _Optional[str] = ..., title: _Optional[str] = ..., passages: _Optional[int] = ..., metadata: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., source: _Optional[str] = ...) -> None: ...

class ScanDocumentsResponse(_message.Message):
    __slots__ = ("documents", "total_documents")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[StoredDocument]
    total_documents: int
    def __init__(self, documents: _Optional[_Iterable[_Union[StoredDocument, _Mapping]]] = ..., total_documents: _Optional[int] = ...) -> None: ...

class ScanPassagesRequest(_message.Message):
    __slots__ = ("context", "collection", "document_ids")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    collection: str
    document_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., collection: _Optional[str] = ..., document_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ScanPassagesResponse(_message.Message):
    __slots__ = ("passages",)
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    passages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Passage]
    def __init__(self, passages: _Optional[_Iterable[_Union[_common_pb2.Passage, _Mapping]]] = ...) -> None: ...

class ScanCollectionsRequest(_message.Message):
    __slots__ = ("context",)
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ...) -> None: ...

class StoredCollection(_message.Message):
    __slots__ = ("name", "documents", "passages", "language")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    documents: int
    passages: int
    language: str
    def __init__(self, name: _Optional[str] = ..., documents: _Optional[int] = ..., passages: _Optional[int] = ..., language: _Optional[str] = ...) -> None: ...

class ScanCollectionsResponse(_message.Message):
    __slots__ = ("collections",)
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    collections: _containers.RepeatedCompositeFieldContainer[StoredCollection]
    def __init__(self, collections: _Optional[_Iterable[_Union[StoredCollection, _Mapping]]] = ...) -> None: ...

class GetRetrieverStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRetrieverStatusResponse(_message.Message):
    __slots__ = ("backend", "embedding_model", "dimensions", "collections", "passages", "tenants")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_MODEL_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    backend: str
    embedding_model: str
    dimensions: int
    collections: int
    passages: int
    tenants: _containers.RepeatedCompositeFieldContainer[TenantStored]
    def __init__(self, backend: _Optional[str] = ..., embedding_model: _Optional[str] = ..., dimensions: _Optional[int] = ..., collections: _Optional[int] = ..., passages: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[TenantStored, _Mapping]]] = ...) -> None: ...

class TenantStored(_message.Message):
    __slots__ = ("tenant", "collections", "documents", "passages", "bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    collections: int
    documents: int
    passages: int
    bytes: int
    def __init__(self, tenant: _Optional[str] = ..., collections: _Optional[int] = ..., documents: _Optional[int] = ..., passages: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...
