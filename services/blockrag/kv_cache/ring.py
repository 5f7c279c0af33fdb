"""A consistent hash ring: which shard a key belongs to.

Equal in every process (Python's own ``hash`` of a string is not), and adding a shard moves only the keys that the new
shard takes over.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence

_VIRTUAL_NODES = 160


class HashRing:
    """Maps keys to nodes, each node standing at many points of a 64-bit circle.

    With 160 points per node, a node's share of the keys stays within about a fifth of the mean.
    """

    def __init__(self, nodes: Sequence[str], *, virtual_nodes: int = _VIRTUAL_NODES) -> None:
        if not nodes:
            raise ValueError("a ring needs at least one node")
        if len(set(nodes)) != len(nodes):
            raise ValueError("a ring's nodes must differ")
        if virtual_nodes < 1:
            raise ValueError("virtual_nodes must be at least 1")
        self.nodes = tuple(nodes)
        points = sorted(
            (_point(f"{node}#{copy}"), index) for index, node in enumerate(self.nodes) for copy in range(virtual_nodes)
        )
        self._points = [point for point, _ in points]
        self._owners = [index for _, index in points]

    def index(self, key: str) -> int:
        """Index in ``nodes`` of the node that the key belongs to: the first at or after the key's own point."""
        place = bisect.bisect_left(self._points, _point(key))
        return self._owners[place % len(self._owners)]

    def node(self, key: str) -> str:
        """Name of the node that the key belongs to."""
        return self.nodes[self.index(key)]


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"blockrag-ring").digest(), "big")


def shard_names(shards: int) -> list[str]:
    """Names of the shards' deployments; the ring's nodes."""
    return [f"KvCacheShard-{index}" for index in range(shards)]
