"""Nouns that several services share and that are no protobuf message. Imports nothing of blockrag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockForm:
    """What of a block is kept: each form is an object of its own, and none depends on a question."""

    kind: Literal["full", "compressed", "chunks"]
    """``full``: a slot per token. ``compressed``: a slot per chunk. ``chunks``: the chunks' embeddings, no slots."""
    chunk_tokens: int = 0
    """Tokens of a chunk; 0 for ``full``."""

    def __post_init__(self) -> None:
        if (self.kind == "full") != (self.chunk_tokens == 0) or self.chunk_tokens < 0:
            raise ValueError(f"a block in form {self.kind!r} with chunks of {self.chunk_tokens} tokens")

    def __str__(self) -> str:
        return f"{self.kind}-{self.chunk_tokens}" if self.chunk_tokens else self.kind

    def size(self, tokens: int) -> int:
        """Slots, or chunk embeddings, of a block of ``tokens``."""
        return -(-tokens // self.chunk_tokens) if self.chunk_tokens else tokens


FULL = BlockForm("full")


def _word_sum(*arrays: NDArray[Any]) -> int:
    """Sum of all 64-bit words, modulo 2^64: any one wrong word changes it, and it costs no more than reading them."""
    total = 0
    for array in arrays:
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        whole = content.size // 8 * 8
        total += int(content[:whole].view(np.uint64).sum(dtype=np.uint64))
        total += int.from_bytes(content[whole:].tobytes(), "little")
    return total % 2**64


class _Summed:
    """An object that says whether it still is what was made: its sum is taken then, and travels with it."""

    checksum: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "checksum", _word_sum(*self._arrays()))

    @property
    def intact(self) -> bool:
        """Whether no byte of the arrays has changed since the block was made."""
        return self.checksum == _word_sum(*self._arrays())

    def _arrays(self) -> Iterator[NDArray[Any]]:
        """Of all fields, in their order."""
        for value in vars(self).values():
            for array in value if isinstance(value, tuple) else (value,):
                if isinstance(array, np.ndarray):
                    yield array


@dataclass(frozen=True)
class BlockKV(_Summed):
    """A block's attention state, as one immutable object of the object store.

    Keys are kept **before rotation**, so a block fits any place of any prompt. Arrays that come out of the object
    store are read-only views of shared memory: never write to them.
    """

    key: str
    """Cache key, see ``blockrag.keys``."""
    token_ids: NDArray[np.int32]
    """Tokens of the block, shape [n]."""
    keys: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int8]
    """Unrotated K, shape [layers, kv_heads, slots, head_dim]; uint16 holds the bits of bfloat16. There are n slots, in
    the compressed form one for each chunk."""
    values: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int8]
    """V, same shape and type as ``keys``."""
    scales: tuple[NDArray[np.uint16], NDArray[np.uint16]] | None = None
    """Of K and V in int8, see ``blockrag.modeling.slots.Scales``; bits of bfloat16."""
    checksum: int = field(init=False, compare=False, repr=False)

    @property
    def num_slots(self) -> int:
        """Positions that the block takes in a prompt."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return int(sum(array.nbytes for array in (self.keys, self.values, *(self.scales or ()))))


@dataclass(frozen=True)
class ChunkEmbeddings(_Summed):
    """A block's chunk embeddings, as one immutable object of the object store; read-only like ``BlockKV``."""

    key: str
    """Cache key, see ``blockrag.keys``."""
    token_ids: NDArray[np.int32]
    """Tokens of the block, shape [n]."""
    embeddings: NDArray[np.float32]
    """One row for each chunk, shape [chunks, width of the chunk encoder]."""
    checksum: int = field(init=False, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings."""
        return int(self.embeddings.nbytes)


CachedBlock = BlockKV | ChunkEmbeddings
"""What the cache keeps of a block, depending on its form."""


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
    form: BlockForm = FULL
    """In which form; part of the key."""

    @property
    def size(self) -> int:
        """Slots, or chunk embeddings, that the block has in its form."""
        return self.form.size(int(self.token_ids.size))
