"""What a source of training contexts makes: passages as text, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from blockrag.modeling.template import PromptTemplate
from blockrag.training.data import Article
from blockrag.training.passages import DecodingTokenizer, cut_passage, sentences


@dataclass(frozen=True)
class BatchShape:
    """What the contexts of one batch have in common, so that its rows are about equally long."""

    passages: int
    passage_tokens: int
    """Most tokens of a passage's block."""

    @property
    def questions(self) -> int:
        """Most questions asked of a context. One costs about 22 tokens, a passage 70 to 120: the more are asked of a
        context that is read anyway, the more a token teaches."""
        return min(32, max(12, 3 * self.passages))

    @property
    def row_tokens(self) -> int:
        """What a context of this shape takes with its questions, about."""
        return round(0.8 * (self.passages * self.passage_tokens + 22 * self.questions))


@dataclass
class Draft:
    """A context before it is tokenised."""

    passages: list[Article] = field(default_factory=list)
    """Titled texts, in the order of the prompt."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Questions with the answer, which is part of a passage; None where the passages do not answer."""


class Source(Protocol):
    """Makes contexts of one kind."""

    def draft(self, shape: BatchShape, random: Random) -> Draft:
        """A context of at most ``shape.passages`` passages; it may turn out to have no question."""
        ...


class Cutter:
    """Cuts texts to passages as the template's blocks count tokens."""

    def __init__(self, tokenizer: DecodingTokenizer, template: PromptTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def cut(self, article: Article, max_tokens: int) -> str:
        """The beginning of the article's text, in whole sentences."""
        return cut_passage(self._tokenizer, self._template, article.title, article.text, max_tokens)

    def window(self, article: Article, answer: str, max_tokens: int) -> str:
        """The part of a paragraph that starts at most one sentence before the answer's, or at its beginning."""
        text = self.cut(article, max_tokens)
        if answer in text:
            return text
        place = next((n for n, sentence in enumerate(sentences(article.text)) if answer in sentence), 0)
        return cut_passage(
            self._tokenizer, self._template, article.title, article.text, max_tokens, first=max(0, place - 1)
        )

    def room(self, title: str, max_tokens: int) -> int:
        """Tokens left for the text of a passage with this title."""
        return max_tokens - len(self._template.passage_ids(self._tokenizer, title, ""))

    def count(self, sentence: str) -> int:
        """Tokens of a sentence inside a passage."""
        return len(self._tokenizer(" " + sentence, add_special_tokens=False, split_special_tokens=True)["input_ids"])
