"""Counts the tokens of a passage's block, fast enough for documents of tens of megabytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

from blockrag.modeling.running_text import field_ids, running_text
from blockrag.modeling.template import BundleTokenizer, PromptTemplate

_CACHED_WORDS = 200_000
_CACHED_WORD_CHARS = 32


class BlockCounter:
    """Tokens of a passage's block, counted as ``PromptTemplate.passage_ids`` makes them.

    The template tokenises title and text apart, so a block's count is a constant of its title plus the text's count.
    """

    def __init__(self, template: PromptTemplate, tokenizer: BundleTokenizer) -> None:
        before, found, _ = template.passage.partition("{text}")
        if not found:
            raise ValueError("the template's passage has no {text}")
        self._template = template
        self._tokenizer = tokenizer
        self._carried = before[len(before.rstrip(" ")) :]
        self._fast = running_text(tokenizer)
        self._word_counts = _WordCounts(self.text_count)
        # Calling a transformers tokenizer sets flags on it.
        self._calling = threading.Lock()

    def fingerprint(self) -> str:
        """Changes when a text may get another count."""
        digest = hashlib.sha256(self._template.passage.encode())
        if self._fast is not None:
            digest.update(self._fast.described.encode())
        return digest.hexdigest()

    def overhead(self, title: str) -> int:
        """Tokens of a block with this title beyond those of its text."""
        with self._calling:
            block = self._template.passage_ids(self._tokenizer, title, "")
        return len(block) - self.text_count("")

    def text_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text takes in a block."""
        pieces = [self._carried + text for text in texts]
        if self._fast is not None:
            return [len(ids) for ids in self._fast.ids_of(pieces)]
        return [len(field_ids(self._tokenizer, piece)) if piece else 0 for piece in pieces]

    def text_count(self, text: str) -> int:
        """Tokens that one text takes in a block."""
        return self.text_counts([text])[0]

    def estimate(self, text: str) -> int:
        """About ``text_count``, from the counts of its words, which are kept.

        Right for vocabularies that never merge across a space, up to words that follow a newline.
        """
        return text.count("\n") + sum(map(self._word_counts.__getitem__, text.split()))


class _WordCounts(dict[str, int]):
    """Counts of words, kept up to a limit. A dict, so that a known word costs no Python call."""

    def __init__(self, count: Callable[[str], int]) -> None:
        super().__init__()
        self._count = count

    def __missing__(self, word: str) -> int:
        count = self._count(word)
        if len(word) <= _CACHED_WORD_CHARS:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = count
        return count
