"""Texts to token ids, and what a plan says of a passage before anything is decided: both remembered, since the same
passages are asked for again and again, and a prepared question twice.

Making a message for each chunk takes ten times as long as copying one for the whole passage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from blockrag.budget import chunk_bounds
from blockrag.compressor.sentences import Sentence, sentences_of
from blockrag.decoder.detokenizer import Detokenizer
from blockrag.lru import Lru, remembering
from blockrag.modeling.template import BundleTokenizer, PromptTemplate
from blockrag.v1.common_pb2 import CHUNK_FORM_COMPRESSED, CHUNK_FORM_EXPANDED, ChunkDecision
from blockrag.v1.compressor_pb2 import PassagePlan

_REMEMBERED_QUESTIONS = 256
USUAL_TOKENS = 128
"""Of a passage. A memory of so many passages is one of so many times these tokens: given passages may be a hundred
times as long."""


def counted_tokens(tokens: int) -> int:
    """What a block of so many counts for in such a memory."""
    return max(tokens, USUAL_TOKENS)


class PassageTokenizer:
    """Tokenises passages with a bundle's template and keeps the most recent results.

    Not thread-safe; made for one replica's event loop.
    """

    def __init__(self, tokenizer: BundleTokenizer, template: PromptTemplate, remembered: int = 65_536) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._known: Lru[tuple[str, str], tuple[int, ...]] = Lru(
            remembered * USUAL_TOKENS, lambda ids: counted_tokens(len(ids))
        )
        self.instruction_ids: tuple[int, ...] = tuple(template.instruction_ids(tokenizer))
        of_questions = lru_cache(maxsize=_REMEMBERED_QUESTIONS)
        self.final_ids = of_questions(lambda question: tuple(template.final_ids(tokenizer, question)))
        """Token ids of the final block of a question."""
        self.turn_ids = of_questions(lambda question, answer: tuple(template.turn_ids(tokenizer, question, answer)))
        """Token ids of the block of an earlier question and its answer."""
        self.request_ids = of_questions(lambda instructions: tuple(template.request_ids(tokenizer, instructions)))
        """Token ids of the block of what a caller asks of every answer."""

    def passage_ids(self, title: str, text: str) -> tuple[int, ...]:
        """Token ids of a passage's block."""
        ids = self._known.get((title, text))
        if ids is None:
            ids = tuple(self._template.passage_ids(self._tokenizer, title, text))
            self._known.put((title, text), ids)
        return ids

    def remembers(self, title: str, text: str) -> bool:
        """Whether a passage needs no tokenising."""
        return (title, text) in self._known

    def remember(self, title: str, text: str, ids: Iterable[int]) -> None:
        """Keep what another tokenizer of the same bundle made of a passage."""
        if (title, text) not in self._known:
            self._known.put((title, text), tuple(ids))


class PassageDrafts:
    """Token ids and chunks of passages' blocks, to be copied and never to be changed. Not thread-safe.

    ``plain`` has every chunk expanded and without its words; ``worded`` has every chunk compressed and its words, for
    readers who want to see what was read word for word. Together the words of a block's chunks are the block's text,
    without the template's markers. A character whose bytes fall into two chunks counts to the later.
    """

    def __init__(self, new_detokenizer: Callable[[], Detokenizer], chunk_tokens: int, remembered: int = 8_192) -> None:
        self._new_detokenizer = new_detokenizer
        self._chunk_tokens = chunk_tokens
        limit = remembered * USUAL_TOKENS
        self._words: Lru[tuple[int, ...], PassagePlan] = Lru(limit, _plan_tokens)
        self.plain = remembering(self._plain, limit, _plan_tokens)
        self.sentences = remembering(self._sentences, limit, lambda found: counted_tokens(found[-1].end))
        """The sentences of a block: of token ids and the passage's text."""

    def worded(self, token_ids: tuple[int, ...]) -> PassagePlan:
        """The draft with its words."""
        draft = self._words.get(token_ids)
        if draft is None:
            draft = self._worded(token_ids)
            self._words.put(token_ids, draft)
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
            self._words.put(token_ids, draft)

    def _plain(self, token_ids: tuple[int, ...]) -> PassagePlan:
        bounds = chunk_bounds(len(token_ids), self._chunk_tokens)
        chunks = [ChunkDecision(start_token=start, end_token=end, form=CHUNK_FORM_EXPANDED) for start, end in bounds]
        return PassagePlan(token_ids=token_ids, chunks=chunks)

    def _sentences(self, token_ids: tuple[int, ...], text: str) -> tuple[Sentence, ...]:
        detokenizer = self._new_detokenizer()
        return sentences_of([detokenizer.feed(token) for token in token_ids], text)

    def _worded(self, token_ids: tuple[int, ...]) -> PassagePlan:
        detokenizer = self._new_detokenizer()
        plan = PassagePlan(token_ids=token_ids)
        for start, end in chunk_bounds(len(token_ids), self._chunk_tokens):
            text = "".join(map(detokenizer.feed, token_ids[start:end]))
            plan.chunks.add(start_token=start, end_token=end, form=CHUNK_FORM_COMPRESSED, text=text)
        return plan


def _plan_tokens(plan: PassagePlan) -> int:
    return counted_tokens(len(plan.token_ids))
