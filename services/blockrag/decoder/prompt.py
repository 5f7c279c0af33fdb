"""From a DecodeRequest to what the engine and the block loader work on; every problem is named by its field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.decoder.sampling import SamplingParams
from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.types import BlockRequest
from blockrag.v1 import common_pb2, decoder_pb2

MODE_NAMES = {
    common_pb2.ATTENTION_MODE_BLOCK: "block",
    common_pb2.ATTENTION_MODE_FULL: "full",
    common_pb2.ATTENTION_MODE_NONE: "none",
}


@dataclass(frozen=True)
class Prompt:
    """A checked prompt."""

    mode: str
    """block, full or none; a tag of metrics and spans."""
    blocks: tuple[BlockRequest, ...]
    """Blocks to compose, in order; empty unless in block mode."""
    token_ids: tuple[int, ...]
    """Tokens to prefill behind them."""
    slots: int
    """Tokens of the whole prompt."""
    sampling: SamplingParams


def read_prompt(request: decoder_pb2.DecodeRequest, keys: KeyMaker, vocab_size: int) -> Prompt:
    """Check a request and take it apart.

    In block mode each block is one to compose from the caches. In the other modes all blocks are tokens to prefill,
    in front of the final block's. Raises ``InvalidRequestError``.
    """
    mode = request.attention_mode or common_pb2.ATTENTION_MODE_BLOCK
    if mode not in MODE_NAMES:
        raise InvalidRequestError("attention_mode", f"{mode} is unknown")
    final = _token_ids("final_token_ids", request.final_token_ids, vocab_size)
    blocks = [
        _token_ids(f"blocks[{place}].token_ids", block.token_ids, vocab_size)
        for place, block in enumerate(request.blocks)
    ]
    slots = sum(map(len, blocks)) + len(final)
    sampling = _sampling(request.sampling)
    if mode != common_pb2.ATTENTION_MODE_BLOCK:
        whole = np.concatenate([*blocks, final])
        return Prompt(MODE_NAMES[mode], (), tuple(whole.tolist()), slots, sampling)
    tenant = request.context.tenant
    requests = tuple(
        BlockRequest(
            key=keys.block_key(tenant, token_ids),  # type: ignore[arg-type]  # an array is a sequence of ints here
            token_ids=token_ids,
            tenant=tenant,
            collection=block.collection,
            document_id=block.document_id,
        )
        for block, token_ids in zip(request.blocks, blocks, strict=True)
    )
    return Prompt(MODE_NAMES[mode], requests, tuple(final.tolist()), slots, sampling)


def _sampling(message: common_pb2.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,  # an absent field is 0
        seed=message.seed,
        stop=tuple(message.stop),
    )


def _token_ids(field: str, values: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    ids = np.array(values, dtype=np.int64)  # takes every uint32
    if ids.size == 0:
        raise InvalidRequestError(field, "must hold at least one token")
    if int(ids.max()) >= vocab_size:
        raise InvalidRequestError(field, f"holds {int(ids.max())}, outside the vocabulary of {vocab_size} tokens")
    return ids.astype(np.int32)
