"""Long texts as passages: what reconstruction and next-paragraph training read.

One JSON object per line, with ``title`` and either ``text`` or a list ``paragraphs``; other keys are ignored.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from random import Random
from typing import Any

from blockrag.errors import SetupError
from blockrag.modeling.running_text import field_ids
from blockrag.modeling.template import PromptTemplate
from blockrag.training.adaptation.batch import Branch
from blockrag.training.adaptation.samples import (
    DecodingTokenizer,
    Row,
    hold_out_rows,
    read_parsed,
    read_rows,
    sentences,
)

_HELD_OUT_SHARE = 50
"""One text in this many is held out."""
_TRIES = 200
_CHARACTERS = 10
"""Of a text for each token wanted: about twice what a token takes, because long sentences are passed."""


@dataclass(frozen=True)
class Text:
    """A titled text."""

    title: str
    paragraphs: tuple[str, ...]

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.paragraphs))


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """All texts, in order. Raises SetupError naming file and line of the first bad one, or when there is none."""
    return read_parsed(paths, _parse, "texts")


def hold_out(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Texts to train on and texts to measure on, by their content. Raises SetupError for a single text."""
    if len(texts) < 2:
        raise SetupError("a single text: at least two are needed, one to measure on")
    held = [_digest(text) % _HELD_OUT_SHARE == 0 for text in texts]
    if not any(held) or all(held):
        chosen = min(range(len(texts)), key=lambda number: _digest(texts[number]))
        held = [number == chosen for number in range(len(texts))]
    train = [text for text, out in zip(texts, held, strict=True) if not out]
    return train, [text for text, out in zip(texts, held, strict=True) if out]


@dataclass(frozen=True)
class HeldOut:
    """Texts and questions, read and checked: to train on, and held out."""

    texts: tuple[Sequence[Text], Sequence[Text]]
    rows: tuple[Sequence[Row], Sequence[Row]]


def read_held_out(texts: Sequence[Path], rows: Sequence[Path], count: int, seed: int) -> HeldOut:
    """Read files of texts and of question rows, of which about ``count`` are held out.

    Raises SetupError naming the file and the problem.
    """
    return HeldOut(
        texts=hold_out(read_texts(texts)) if texts else ((), ()),
        rows=hold_out_rows(read_rows(rows) if rows else [], count, seed),
    )


@dataclass
class PassageSource:
    """Draws consecutive passages of one text."""

    texts: Sequence[Text]
    tokenizer: DecodingTokenizer
    template: PromptTemplate
    passage_tokens: int
    """Most tokens of a passage's block."""

    def __post_init__(self) -> None:
        self._weights = list(accumulate(text.size for text in self.texts))

    def draw(self, count: int, random: Random, least: int = 1) -> list[list[int]]:
        """Ids of ``least`` to ``count`` passages that follow each other, from a place drawn at random.

        Raises SetupError when no text seems to have that many.
        """
        for _ in range(_TRIES):
            text = random.choices(self.texts, cum_weights=self._weights)[0]
            passages = self._cut(text, count, random)
            if len(passages) >= least:
                return passages
        raise SetupError(f"{_TRIES} texts one after another have fewer than {least} passages")

    def draw_target(self, count: int, random: Random) -> tuple[tuple[tuple[int, ...], ...], Branch]:
        """Passages as of ``draw``, at least one and ``count`` at most, and the one after them as the target."""
        drawn = self.draw(count + 1, random, least=2)
        return tuple(map(tuple, drawn[:-1])), as_target(drawn[-1], text_start(drawn[0], drawn[1:]))

    def _cut(self, text: Text, count: int, random: Random) -> list[list[int]]:
        template, tokenizer = self.template, self.tokenizer
        room = self.passage_tokens - len(template.passage_ids(tokenizer, text.title, ""))
        pieces: list[list[str]] = []
        left = 0
        for sentence in self._sentences(text, count * self.passage_tokens, random):
            tokens = len(field_ids(tokenizer, " " + sentence))
            if tokens > room:
                continue
            if tokens > left:
                if len(pieces) == count:
                    break
                pieces.append([])
                left = room
            pieces[-1].append(sentence)
            left -= tokens
        return [template.passage_ids(tokenizer, text.title, " ".join(piece)) for piece in pieces]

    def _sentences(self, text: Text, room: int, random: Random) -> Iterator[str]:
        """Sentences in order from a place drawn at random on, enough of them for ``room`` tokens."""
        first = random.randrange(len(text.paragraphs))
        paragraph, enough = text.paragraphs[first], room * _CHARACTERS
        if len(paragraph) > enough:
            # a book may be one paragraph: what is read is cut out of it before it is cut into sentences
            start = random.randrange(len(paragraph) - enough // 2)
            opening = sentences(paragraph[start : start + enough])
            yield from opening[1 if start else 0 :]
            if start + enough < len(paragraph):
                return
        else:
            opening = sentences(paragraph)
            yield from opening[random.randrange(len(opening)) if len(text.paragraphs) > 1 else 0 :]
        for paragraph in text.paragraphs[first + 1 :]:
            yield from sentences(paragraph)


def text_start(passage: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Where a passage's own text begins: after what all passages of its text open with. At least 1."""
    common = takewhile(lambda tokens: len(set(tokens)) == 1, zip(passage, *others, strict=False))
    return max(1, len(list(common))) if others else 1


def as_target(passage: Sequence[int], start: int) -> Branch:
    """A passage that is to be predicted from its token ``start`` on, of which at least the last is left."""
    start = min(start, len(passage) - 1)
    return Branch(passage[:start], passage[start:])


def _digest(text: Text) -> int:
    return zlib.crc32(f"{text.title}\n{text.paragraphs[0]}".encode())


def _parse(place: str, values: Mapping[str, Any]) -> Text:
    title = values.get("title", "")
    parts = values["paragraphs"] if "paragraphs" in values else [values.get("text")]
    if not isinstance(title, str):
        raise SetupError(f"{place}: title must be a text")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise SetupError(f"{place}: needs text, or paragraphs as a list of texts")
    kept = tuple(clean for clean in (" ".join(part.split()) for part in parts) if clean)
    if not kept:
        raise SetupError(f"{place}: the text is empty")
    return Text(title.rpartition("/")[2], kept)
