"""What cache shards and their callers say to each other inside the cluster. KV bytes never travel in a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from blockrag.types import BlockRequest, CachedBlock

Tier = Literal["store", "disk", "volume", "encoded"]
"""``store``: the block was held already. ``disk``, ``volume``: it was read from a file there. ``encoded``: a forward
pass ran for it. All but the first by this request or one that it joined."""


class DocumentId(NamedTuple):
    """A tenant's document; an empty ``document_id`` stands for the collection, or for blocks of no document."""

    tenant: str
    collection: str
    document_id: str

    @property
    def named(self) -> bool:
        """False for what belongs to no document: the instruction block, passages given in a request."""
        return bool(self.collection or self.document_id)


@dataclass(frozen=True)
class AcquiredBlock:
    """A block that a shard holds or has just had encoded."""

    key: str
    ref: list[Any]
    """One ``ObjectRef`` to a ``CachedBlock``; in a list, so that Ray hands over the reference and not the object."""
    tier: Tier
    nbytes: int
    """Bytes of the object in the store."""
    generation: int = 0
    """Which of the objects that the key ever stood for this is: given back in ``report_lost``."""


class EncodedObject(NamedTuple):
    """An object that was made for a shard, by the encoder or of a file."""

    ref: Any
    nbytes: int


@dataclass(frozen=True)
class FetchedBlock:
    """A block that can be read in this process."""

    block: CachedBlock
    """Arrays are read-only views of the object store."""
    tier: Tier


class BlockSource(Protocol):
    """Where a service has missing blocks from: the cluster's cache, or an encoder in its own process."""

    async def fetch(self, requests: Sequence[BlockRequest]) -> list[FetchedBlock]:
        """The blocks, in the order asked. Raises ``BlockragError`` kinds."""
        ...

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        """Where each block would come from now, as far as is told at once."""
        ...


@dataclass(frozen=True)
class PurgeLog:
    """Keys purged since a reader's cursor."""

    cursor: int
    """Give it to the next call."""
    keys: list[str]
    reset: bool
    """The reader fell behind, or the shard is a new one: forget every block."""


@dataclass(frozen=True)
class WarmOutcome:
    """What warming did."""

    hits: int = 0
    encoded: frozenset[str] = frozenset()
    """Keys of the blocks that were encoded."""
    encoded_bytes: int = 0
    over_budget: bool = False
    """True when a block was evicted or refused for want of room."""

    def __add__(self, other: WarmOutcome) -> WarmOutcome:
        return WarmOutcome(
            self.hits + other.hits,
            self.encoded | other.encoded,
            self.encoded_bytes + other.encoded_bytes,
            self.over_budget or other.over_budget,
        )
