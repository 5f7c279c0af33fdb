"""Which of several decoders a question goes to: the one that will have its first token soonest, as far as is known.

Known is what was sent to each (a decoder keeps the blocks of its last prompts in memory, as many as ``decoder.l1_mb``
holds), on which node each is (what one decoder of a node has read is in that node's object store for the others), and
how many requests it has. A decoder's score, the least wins, is

    tokens of the prompt's blocks that it was not sent × ``READ_MS``
    + of these, tokens that no decoder of its node was sent × ``FETCH_MS`` + requests that it has × ``REQUEST_MS``

so of decoders that are equally busy a question goes to the one that holds most of it, then to one whose node does, and
no decoder is preferred that has one request more unless that spares it thousands of tokens. Among equal scores a block
belongs to one decoder by rendezvous hashing, and the one to which most of the prompt belongs is first: each gateway
knows only what it sent itself, and so they place alike what they have not sent yet. On which node a block was encoded
is not known.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar
from zlib import crc32

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from blockrag.kv_cache.shards import owner
from blockrag.lru import Lru
from blockrag.v1.decoder_pb2 import DecodeRequest, EstimatePrefillRequest

READ_MS = 0.002
"""To place a token's K and V out of the node's own object store: 23 KB, 10 GB a second."""
FETCH_MS = 0.02
"""To bring them there from another node's: about a gigabyte a second."""
REQUEST_MS = 80.0
"""What a request in front of one's own costs: a prefill, with the bundled reader on two cores."""

Name = TypeVar("Name")
Block = tuple[int, int]
"""Hash and tokens."""


class Affinity:
    """What each decoder was sent, and the order that follows from it. For one event loop."""

    def __init__(self, held_tokens: int, stored_tokens: int) -> None:
        """``held_tokens``: of blocks, that a decoder keeps; ``stored_tokens``: that its node's object store does."""
        self._held: _Sent = _Sent(held_tokens)
        self._stored: _Sent = _Sent(stored_tokens)

    def order(self, waiting: Mapping[Name, int], blocks: Sequence[Block], nodes: Mapping[Name, Any]) -> list[Name]:
        """Decoders by their score, the best first; without blocks, in no order but that of their requests.

        ``waiting``: requests that each has; ``nodes``: where each is.
        """
        names = random.sample(list(waiting), len(waiting))
        known = [str(name) for name in names]
        own: Counter[Name] = Counter()
        for block, tokens in blocks:
            own[names[owner(str(block), known)]] += tokens

        def score(name: Name) -> tuple[float, int]:
            missing = [block for block in blocks if not self._held.was(name, block)]
            far = [block for block in missing if not self._stored.was(nodes[name], block)]
            return _tokens(missing) * READ_MS + _tokens(far) * FETCH_MS + waiting[name] * REQUEST_MS, -own[name]

        return sorted(names, key=score)

    def sent(self, name: Any, blocks: Iterable[Block], node: Any) -> None:
        """A decoder is sent these blocks."""
        for block in blocks:
            self._held.add(name, block)
            self._stored.add(node, block)

    def keep(self, nodes: Mapping[Any, Any]) -> None:
        """Forget all decoders but these, and all nodes but theirs."""
        self._held.keep(nodes)
        self._stored.keep(set(nodes.values()))


class _Sent:
    """The last blocks of each place, as many tokens as it keeps."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._blocks: dict[Any, Lru[int, int]] = {}

    def was(self, place: Any, block: Block) -> bool:
        held = self._blocks.get(place)
        return held is not None and block[0] in held

    def add(self, place: Any, block: Block) -> None:
        self._blocks.setdefault(place, Lru(self._tokens, int)).put(*block)

    def keep(self, places: Iterable[Any]) -> None:
        self._blocks = {place: held for place in places if (held := self._blocks.get(place)) is not None}


def _tokens(blocks: Iterable[Block]) -> int:
    return sum(tokens for _, tokens in blocks)


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Serve has no types
    """Serve's router of the decoders' handle."""

    def initialize_state(self, held_tokens: int, stored_tokens: int) -> None:
        """Serve calls it with the configuration's arguments."""
        self._affinity = Affinity(held_tokens, stored_tokens)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came or went."""
        super().update_replicas(replicas)
        self._affinity.keep({name: replica.node_id for name, replica in self.curr_replicas.items()})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, best first: one that has no room is passed over."""
        known = self.replica_queue_len_cache
        waiting = {replica.replica_id: known.get(replica.replica_id) or 0 for replica in candidate_replicas}
        nodes = {replica.replica_id: replica.node_id for replica in candidate_replicas}
        replicas = self.curr_replicas
        order = self._affinity.order(waiting, _blocks(pending_request), nodes)
        return [[replicas[name]] for name in order if name in replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """A request is on its way."""
        replica = self.curr_replicas.get(replica_id)
        if replica is not None and isinstance(pending_request.args[0], DecodeRequest):
            self._affinity.sent(replica_id, _blocks(pending_request), replica.node_id)


def _blocks(pending: PendingRequest | None) -> list[Block]:
    """Blocks of the question that is asked or planned; none of what asks for a status."""
    request = pending.args[0] if pending is not None and pending.args else None
    if not isinstance(request, DecodeRequest | EstimatePrefillRequest):
        return []
    tenant = crc32(request.context.tenant.encode())
    # of whole numbers alone, whose hash is the same in every process
    return [(hash((tenant, *block.token_ids)), len(block.token_ids)) for block in request.blocks]
