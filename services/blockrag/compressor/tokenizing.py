"""Texts to token ids, remembered: the same passage is asked for again and again, a prepared question twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache

from blockrag.modeling.template import BundleTokenizer, PromptTemplate

_REMEMBERED_QUESTIONS = 256


class PassageTokenizer:
    """Tokenises passages with a bundle's template and keeps the most recent results.

    Not thread-safe; made for one replica's event loop.
    """

    def __init__(self, tokenizer: BundleTokenizer, template: PromptTemplate, remembered: int = 65_536) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._remembered = remembered
        self._cache: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()
        self.instruction_ids: tuple[int, ...] = tuple(template.instruction_ids(tokenizer))
        self.final_ids = lru_cache(maxsize=_REMEMBERED_QUESTIONS)(self._final_ids)
        """Token ids of the final block of a question."""
        self.turn_ids = lru_cache(maxsize=_REMEMBERED_QUESTIONS)(self._turn_ids)
        """Token ids of the block of an earlier question and its answer."""
        self.request_ids = lru_cache(maxsize=_REMEMBERED_QUESTIONS)(self._request_ids)
        """Token ids of the block of what a caller asks of every answer."""

    def passage_ids(self, title: str, text: str) -> tuple[int, ...]:
        """Token ids of a passage's block."""
        key = (title, text)
        ids = self._cache.get(key)
        if ids is None:
            ids = tuple(self._template.passage_ids(self._tokenizer, title, text))
            self._keep(key, ids)
        else:
            self._cache.move_to_end(key)
        return ids

    def remembers(self, title: str, text: str) -> bool:
        """Whether a passage needs no tokenising."""
        return (title, text) in self._cache

    def remember(self, title: str, text: str, ids: Iterable[int]) -> None:
        """Keep what another tokenizer of the same bundle made of a passage."""
        if (title, text) not in self._cache:
            self._keep((title, text), tuple(ids))

    def _keep(self, key: tuple[str, str], ids: tuple[int, ...]) -> None:
        self._cache[key] = ids
        if len(self._cache) > self._remembered:
            self._cache.popitem(last=False)

    def _final_ids(self, question: str) -> tuple[int, ...]:
        return tuple(self._template.final_ids(self._tokenizer, question))

    def _turn_ids(self, question: str, answer: str) -> tuple[int, ...]:
        return tuple(self._template.turn_ids(self._tokenizer, question, answer))

    def _request_ids(self, instructions: str) -> tuple[int, ...]:
        return tuple(self._template.request_ids(self._tokenizer, instructions))
