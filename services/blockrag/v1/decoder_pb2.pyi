from blockrag.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("context", "blocks", "final_token_ids", "attention_mode", "sampling", "time_left_ms")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FINAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MODE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    blocks: _containers.RepeatedCompositeFieldContainer[_common_pb2.PromptBlock]
    final_token_ids: _containers.RepeatedScalarFieldContainer[int]
    attention_mode: _common_pb2.AttentionMode
    sampling: _common_pb2.Sampling
    time_left_ms: int
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[_common_pb2.PromptBlock, _Mapping]]] = ..., final_token_ids: _Optional[_Iterable[int]] = ..., attention_mode: _Optional[_Union[_common_pb2.AttentionMode, str]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., time_left_ms: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("text", "tokens", "finish")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: int
    finish: DecodeFinish
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[int] = ..., finish: _Optional[_Union[DecodeFinish, _Mapping]] = ...) -> None: ...

class DecodeFinish(_message.Message):
    __slots__ = ("reason", "usage", "stages", "blocks")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    usage: _common_pb2.Usage
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.StageTime]
    blocks: _containers.RepeatedCompositeFieldContainer[_common_pb2.BlockSlots]
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.StageTime, _Mapping]]] = ..., blocks: _Optional[_Iterable[_Union[_common_pb2.BlockSlots, _Mapping]]] = ...) -> None: ...

class GetDecoderStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDecoderStatusResponse(_message.Message):
    __slots__ = ("bundle_fingerprint", "running", "waiting", "used_slots", "total_slots", "l1_blocks", "l1_bytes", "l1_budget_bytes", "l1_hits", "l1_misses", "generated_tokens", "device", "bundle_name", "max_positions", "prefill_base_ms", "prefill_slot_ms", "measured_prefills", "compute_dtype", "weights", "kv_dtype", "slot_bytes")
    BUNDLE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    USED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    L1_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    L1_BYTES_FIELD_NUMBER: _ClassVar[int]
    L1_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    L1_HITS_FIELD_NUMBER: _ClassVar[int]
    L1_MISSES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BASE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SLOT_MS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    bundle_fingerprint: str
    running: int
    waiting: int
    used_slots: int
    total_slots: int
    l1_blocks: int
    l1_bytes: int
    l1_budget_bytes: int
    l1_hits: int
    l1_misses: int
    generated_tokens: int
    device: str
    bundle_name: str
    max_positions: int
    prefill_base_ms: float
    prefill_slot_ms: float
    measured_prefills: int
    compute_dtype: str
    weights: str
    kv_dtype: str
    slot_bytes: int
    def __init__(self, bundle_fingerprint: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., used_slots: _Optional[int] = ..., total_slots: _Optional[int] = ..., l1_blocks: _Optional[int] = ..., l1_bytes: _Optional[int] = ..., l1_budget_bytes: _Optional[int] = ..., l1_hits: _Optional[int] = ..., l1_misses: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., device: _Optional[str] = ..., bundle_name: _Optional[str] = ..., max_positions: _Optional[int] = ..., prefill_base_ms: _Optional[float] = ..., prefill_slot_ms: _Optional[float] = ..., measured_prefills: _Optional[int] = ..., compute_dtype: _Optional[str] = ..., weights: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class EstimatePrefillRequest(_message.Message):
    __slots__ = ("context", "blocks")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    context: _common_pb2.RequestContext
    blocks: _containers.RepeatedCompositeFieldContainer[_common_pb2.PromptBlock]
    def __init__(self, context: _Optional[_Union[_common_pb2.RequestContext, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[_common_pb2.PromptBlock, _Mapping]]] = ...) -> None: ...

class EstimatePrefillResponse(_message.Message):
    __slots__ = ("base_ms", "slot_ms", "measured_prefills", "tiers", "fetches")
    BASE_MS_FIELD_NUMBER: _ClassVar[int]
    SLOT_MS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    base_ms: float
    slot_ms: float
    measured_prefills: int
    tiers: _containers.RepeatedScalarFieldContainer[str]
    fetches: _containers.RepeatedCompositeFieldContainer[FetchCost]
    def __init__(self, base_ms: _Optional[float] = ..., slot_ms: _Optional[float] = ..., measured_prefills: _Optional[int] = ..., tiers: _Optional[_Iterable[str]] = ..., fetches: _Optional[_Iterable[_Union[FetchCost, _Mapping]]] = ...) -> None: ...

class FetchCost(_message.Message):
    __slots__ = ("tier", "base_ms", "token_ms")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BASE_MS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    base_ms: float
    token_ms: float
    def __init__(self, tier: _Optional[str] = ..., base_ms: _Optional[float] = ..., token_ms: _Optional[float] = ...) -> None: ...
