from blockrag.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenBlock(_message.Message):
    __slots__ = ("key", "token_ids", "form")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    key: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    form: _common_pb2.BlockForm
    def __init__(self, key: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., form: _Optional[_Union[_common_pb2.BlockForm, str]] = ...) -> None: ...

class EncodeBlocksRequest(_message.Message):
    __slots__ = ("context", "blocks")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    blocks: _containers.RepeatedCompositeFieldContainer[TokenBlock]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[TokenBlock, _Mapping]]] = ...) -> None: ...

class EncodedBlock(_message.Message):
    __slots__ = ("key", "slots", "bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    key: str
    slots: int
    bytes: int
    def __init__(self, key: _Optional[str] = ..., slots: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class EncodeBlocksResponse(_message.Message):
    __slots__ = ("blocks", "milliseconds")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[EncodedBlock]
    milliseconds: float
    def __init__(self, blocks: _Optional[_Iterable[_Union[EncodedBlock, _Mapping]]] = ..., milliseconds: _Optional[float] = ...) -> None: ...

class GetEncoderStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetEncoderStatusResponse(_message.Message):
    __slots__ = ("bundle_fingerprint", "encoded_blocks", "encoded_tokens", "batches", "device", "compute_dtype")
    BUNDLE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    bundle_fingerprint: str
    encoded_blocks: int
    encoded_tokens: int
    batches: int
    device: str
    compute_dtype: str
    def __init__(self, bundle_fingerprint: _Optional[str] = ..., encoded_blocks: _Optional[int] = ..., encoded_tokens: _Optional[int] = ..., batches: _Optional[int] = ..., device: _Optional[str] = ..., compute_dtype: _Optional[str] = ...) -> None: ...
