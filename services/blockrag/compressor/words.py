"""The words of a passage's chunks, for readers who want to see what was read word for word."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from blockrag.decoder.detokenizer import Detokenizer
from blockrag.modeling.refrag.chunks import chunk_bounds


class ChunkWords:
    """Texts of chunks, remembered: the same passages are asked for again and again.

    Together the texts of a block's chunks are the block's text, without the template's markers. A character whose
    bytes fall into two chunks counts to the later.
    """

    def __init__(self, new_detokenizer: Callable[[], Detokenizer], chunk_tokens: int, remembered: int = 16_384) -> None:
        self._new_detokenizer = new_detokenizer
        self._chunk_tokens = chunk_tokens
        self.of = lru_cache(maxsize=remembered)(self._of)
        """Texts of the chunks of a block, given as a tuple of token ids, in order."""

    def _of(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        detokenizer = self._new_detokenizer()
        return tuple(
            "".join(map(detokenizer.feed, token_ids[start:end]))
            for start, end in chunk_bounds(len(token_ids), self._chunk_tokens)
        )
