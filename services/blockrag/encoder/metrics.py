"""The encoder's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockrag.telemetry.metrics import ENCODED_TOKENS, Counter, Histogram

BATCH_BUCKETS_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class _TokenHistogram(Histogram):
    """A distribution over numbers of tokens."""

    def _make(self, module: Any) -> Any:
        return module.Histogram(self.name, self.description, list(BATCH_BUCKETS_TOKENS), self.tags)


ENCODE_BATCH_TOKENS = _TokenHistogram("blockrag_encode_batch_tokens", "Tokens of an encoder's forward pass.")
ENCODED_BLOCKS = Counter("blockrag_encoded_blocks", "Blocks encoded.")


def record_batch(sizes: Sequence[int]) -> None:
    """Counts one forward pass over blocks of these many tokens."""
    ENCODE_BATCH_TOKENS.observe(sum(sizes))
    ENCODED_TOKENS.inc(sum(sizes))
    ENCODED_BLOCKS.inc(len(sizes))
