"""The encoder's metrics."""

from __future__ import annotations

from collections import Counter as TallyOfForms
from collections.abc import Sequence
from typing import Any

from blockrag.telemetry.metrics import ENCODED_TOKENS, Counter, Histogram
from blockrag.types import BlockRequest

BATCH_BUCKETS_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class _TokenHistogram(Histogram):
    """A distribution over numbers of tokens."""

    def _make(self, module: Any) -> Any:
        return module.Histogram(self.name, self.description, list(BATCH_BUCKETS_TOKENS), self.tags)


ENCODE_BATCH_TOKENS = _TokenHistogram("blockrag_encode_batch_tokens", "Tokens of an encoder's forward pass.")
ENCODED_BLOCKS = Counter("blockrag_encoded_blocks", "Blocks encoded.", ("form",))


def record_batch(requests: Sequence[BlockRequest]) -> None:
    """Counts one batch of blocks."""
    tokens = sum(int(request.token_ids.size) for request in requests)
    ENCODE_BATCH_TOKENS.observe(tokens)
    ENCODED_TOKENS.inc(tokens)
    for form, blocks in TallyOfForms(str(request.form) for request in requests).items():
        ENCODED_BLOCKS.inc(blocks, form=form)
