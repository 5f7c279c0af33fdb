"""Nouns that several services share and that are no protobuf message. Imports nothing of blockrag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockKV:
    """A block's attention state, as one immutable object of the object store.

    Keys are kept **before rotation**, so a block fits any place of any prompt. Arrays that come out of the object
    store are read-only views of shared memory: never write to them.
    """

    key: str
    """Cache key, see ``blockrag.keys``."""
    token_ids: NDArray[np.int32]
    """Tokens of the block, shape [n]."""
    keys: NDArray[np.float32] | NDArray[np.uint16]
    """Unrotated K, shape [layers, kv_heads, n, head_dim]; uint16 holds the bits of bfloat16."""
    values: NDArray[np.float32] | NDArray[np.uint16]
    """V, same shape and type as ``keys``."""

    @property
    def num_slots(self) -> int:
        """Positions that the block takes in a prompt."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return int(self.keys.nbytes + self.values.nbytes)


@dataclass(frozen=True)
class BlockRequest:
    """One block that somebody needs."""

    key: str
    token_ids: NDArray[np.int32]
    tenant: str
    collection: str = ""
    """Empty with ``document_id`` for blocks that belong to no document."""
    document_id: str = ""
    traceparent: str = ""
    """W3C trace context of whoever asks; no part of the block's identity."""
