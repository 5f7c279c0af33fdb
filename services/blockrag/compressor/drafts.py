"""What a plan says of a passage before anything is decided, remembered: the same passages are asked for again and
again, and making a message for each chunk takes ten times as long as copying one for the whole passage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from blockrag.budget import chunk_bounds
from blockrag.decoder.detokenizer import Detokenizer
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
        self._remembered = remembered
        self._words: OrderedDict[tuple[int, ...], PassagePlan] = OrderedDict()
        self.plain = lru_cache(maxsize=remembered)(self._plain)

    def worded(self, token_ids: tuple[int, ...]) -> PassagePlan:
        """The draft with its words."""
        draft = self._words.get(token_ids)
        if draft is None:
            draft = self._worded(token_ids)
            self._keep(token_ids, draft)
        else:
            self._words.move_to_end(token_ids)
        return draft

    def has_words(self, token_ids: tuple[int, ...]) -> bool:
        """Whether the draft with its words is remembered."""
        return token_ids in self._words

    def remember(self, planned: PassagePlan) -> None:
        """Keep the words of a plan that was drafted by another's ``worded``."""
        token_ids = tuple(planned.token_ids)
        if token_ids not in self._words:
            draft = PassagePlan(token_ids=token_ids, chunks=planned.chunks)
            for chunk in draft.chunks:
                chunk.form = CHUNK_FORM_COMPRESSED
            self._keep(token_ids, draft)

    def _keep(self, token_ids: tuple[int, ...], draft: PassagePlan) -> None:
        self._words[token_ids] = draft
        if len(self._words) > self._remembered:
            self._words.popitem(last=False)

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
