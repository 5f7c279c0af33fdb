"""What a compressed chunk still tells: which of its words the decoder says where they are due.

Each is asked for behind the words that stand before it in its chunk, with the chunk compressed in front and without
it: what is right without it was guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from blockrag.training.adaptation.batch import Branch
from blockrag.training.adaptation.samples import DecodingTokenizer
from blockrag.training.refrag.chunk_masks import constant_mask
from blockrag.training.refrag.stage_samples import RefragSample, View

Kind = Literal["name", "number", "word"]
KINDS: tuple[Kind, ...] = ("name", "number", "word")

_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n])[\s\"'()\[\]]*$")
_LONG = 7
"""Letters from which on a word in small letters is one of content more often than not."""


@dataclass(frozen=True)
class Word:
    """A word of a block."""

    kind: Kind
    start: int
    end: int
    """Of its tokens."""


def words_of(token_ids: Sequence[int], tokenizer: DecodingTokenizer) -> Iterator[Word]:
    """The names, numbers and long words of a block whose tokens are theirs alone but for a space before them.

    A name begins with a capital within a sentence.
    """
    ids = list(token_ids)
    ends = [len(tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
    starts = {end: place for place, end in enumerate(ends)}
    text = tokenizer.decode(ids)
    for match in _WORD.finditer(text):
        kind = _kind(match[0], text[: match.start()])
        first = match.start() - (match.start() > 0 and text[match.start() - 1] == " ")
        start, end = starts.get(first), starts.get(match.end())
        if kind is None or start is None or end is None:
            continue
        if tokenizer.decode(ids[start:end]).strip() == match[0]:  # half a character would look like a whole one
            yield Word(kind, start, end)


def kept_words(
    passages: Sequence[Sequence[int]],
    kind: Kind,
    tokenizer: DecodingTokenizer,
    instruction: tuple[int, ...],
    prompt: Sequence[int],
    k: int,
    random: Random,
) -> list[RefragSample]:
    """One word of each passage that has such words within a chunk of ``k`` tokens; two views: with its chunk, without.

    ``prompt``: the final block of an empty question.
    """
    samples = []
    for ids in passages:
        found = [
            word for word in words_of(ids, tokenizer) if word.kind == kind and word.start // k == (word.end - 1) // k
        ]
        if found:
            word = random.choice(found)
            start = word.start // k * k
            piece = tuple(ids[start : start + k])
            branch = (Branch([*prompt, *ids[start : word.start]], ids[word.start : word.end]),)
            views = (View(constant_mask([piece], k, False), branch), View((), branch))
            samples.append(RefragSample(instruction, (piece,), views, "text"))
    return samples


def _kind(word: str, before: str) -> Kind | None:
    if word[0].isdecimal():
        return "number"
    if word[0].isupper() and len(word) > 1 and not _SENTENCE_START.search(before):
        return "name"
    return "word" if word.islower() and len(word) >= _LONG else None
