"""Cutting a text at sentence ends to a passage of at most so many tokens."""

from __future__ import annotations

import re
from typing import Any, Protocol

from blockrag.modeling.running_text import field_ids
from blockrag.modeling.template import BundleTokenizer, PromptTemplate


class DecodingTokenizer(BundleTokenizer, Protocol):
    """A tokenizer that also turns token ids back into text."""

    def decode(self, token_ids: list[int]) -> Any: ...


# An abbreviation's or initial's period ends no sentence; the pattern errs towards longer sentences.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]\"'%])[.!?][\"')\]]* +(?=[A-Z\"'(])|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, without the spaces between them."""
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def cut_passage(
    tokenizer: DecodingTokenizer, template: PromptTemplate, title: str, text: str, max_tokens: int, first: int = 0
) -> str:
    """The longest run of whole sentences from number ``first`` whose block has at most ``max_tokens`` tokens.

    The block counts title and special tokens. A first sentence that alone is too long is cut after a word.
    """
    room = max_tokens - len(template.passage_ids(tokenizer, title, ""))
    kept: list[str] = []
    for sentence in sentences(text)[first:]:
        tokens = field_ids(tokenizer, " " + sentence)
        if len(tokens) > room:
            if not kept and room > 0:
                kept.append(tokenizer.decode(tokens[:room]).strip().rpartition(" ")[0])
            break
        kept.append(sentence)
        room -= len(tokens)
    return " ".join(kept)
