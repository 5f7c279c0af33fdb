"""What a plan says of a passage before anything is decided, remembered: the same passages are asked for again and
again, and making a message for each chunk takes ten times as long as copying one for the whole passage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from blockrag.decoder.detokenizer import Detokenizer
from blockrag.modeling.refrag.chunks import chunk_bounds
from blockrag.v1.common_pb2 import CHUNK_FORM_COMPRESSED, CHUNK_FORM_EXPANDED, ChunkDecision
from blockrag.v1.compressor_pb2 import PassagePlan


class PassageDrafts:
    """Token ids and chunks of passages' blocks, to be copied and never to be changed. Not thread-safe.

    ``plain`` has every chunk expanded and without its words; ``worded`` has every chunk compressed and its words, for
    readers who want to see what was read word for word. Together the words of a block's chunks are the block's text,
    without the template's markers. A character whose bytes fall into two chunks counts to the later.
    """

    def __init__(self, new_detokenizer: Callable[[], Detokenizer], chunk_tokens: int, remembered: int = 8_192) -> None:
        self._new_detokenizer = new_detokenizer
        self._chunk_tokens = chunk_tokens
        self.plain = lru_cache(maxsize=remembered)(self._plain)
        self.worded = lru_cache(maxsize=remembered)(self._worded)

    def _plain(self, token_ids: tuple[int, ...]) -> PassagePlan:
        bounds = chunk_bounds(len(token_ids), self._chunk_tokens)
        chunks = [ChunkDecision(start_token=start, end_token=end, form=CHUNK_FORM_EXPANDED) for start, end in bounds]
        return PassagePlan(token_ids=token_ids, chunks=chunks)

    def _worded(self, token_ids: tuple[int, ...]) -> PassagePlan:
        detokenizer = self._new_detokenizer()
        plan = PassagePlan(token_ids=token_ids)
        for start, end in chunk_bounds(len(token_ids), self._chunk_tokens):
            text = "".join(map(detokenizer.feed, token_ids[start:end]))
            plan.chunks.add(start_token=start, end_token=end, form=CHUNK_FORM_COMPRESSED, text=text)
        return plan
