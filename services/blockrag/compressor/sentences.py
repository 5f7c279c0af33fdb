"""Which sentences of the passages a small prompt has, where the bundle has no chunk encoder.

A passage's block is encoded whole and cached; a prompt may take some of its slots and leave the others out. What is
taken was encoded beside what is not, so a sentence keeps what it refers to. Sentences are ranked by the words that they
share with the question (BM25, IDF over the prompt's own sentences) and by their passage's place, fused by reciprocal
ranks; of a passage that has any, the title stays. Pure functions; no model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockrag.v1.common_pb2 import CHUNK_FORM_EXPANDED
from blockrag.v1.compressor_pb2 import PassagePlan

# Nothing is given back once it was taken, so that no text takes longer than its length.
_END = re.compile(r"(?<=[.!?…])[\"”')\]]*+\s++(?=\S)|(?<=[。！？])|(?<=\n)(?=\S)")
_RANK = 10
"""Constant of reciprocal ranks among sentences."""
_PLACE = 4
"""Places in the ranking of sentences that one place of their passage counts for."""
_PLACE_WEIGHT = 0.25


@dataclass(frozen=True)
class Sentence:
    """Consecutive tokens of a block."""

    start: int
    end: int
    text: str

    @property
    def slots(self) -> int:
        """That it takes."""
        return self.end - self.start


def sentences_of(pieces: Sequence[str], text: str) -> tuple[Sentence, ...]:
    """A block's head (what stands before ``text``, its title; maybe empty), then its sentences, which cover the rest.

    ``pieces``: the text of each of its tokens, one behind the other. A token that ends one sentence and begins another
    counts to the latter.
    """
    whole = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    begin = max(whole.rfind(text), 0)
    cuts = [begin, *(found.end() for found in _END.finditer(whole, begin) if found.end() > begin)]
    bounds = [*(int(np.searchsorted(ends, cut, side="right")) for cut in cuts), len(pieces)]
    spans = [(0, bounds[0]), *((start, end) for start, end in itertools.pairwise(bounds) if end > start)]
    return tuple(Sentence(start, end, "".join(pieces[start:end])) for start, end in spans)


def order_of(
    question: str, passages: Sequence[Sequence[Sentence]], titles: Sequence[str], language: str = ""
) -> list[tuple[int, int]]:
    """All sentences but the heads, the best first: place of the passage, of the sentence in it.

    ``passages``: of each, best first, what ``sentences_of`` gives. ``language``: see ``Bm25Scorer``.
    """
    from blockrag.bm25 import Bm25Scorer  # the gateway imports this module too, and ranks nothing

    places = [(place, number) for place, found in enumerate(passages) for number in range(1, len(found))]
    texts = [(titles[place], passages[place][number].text) for place, number in places]
    scores = Bm25Scorer(texts, language).scores(question)
    by_words = np.empty(len(places))
    by_words[np.argsort(-scores, kind="stable")] = np.arange(len(places))
    by_place = np.array([place for place, _ in places], dtype=np.float64)
    fused = 1 / (_RANK + by_words) + _PLACE_WEIGHT / (_RANK + _PLACE * by_place)
    return [places[index] for index in np.argsort(-fused, kind="stable").tolist()]


def chosen(
    order: Sequence[tuple[int, int]], passages: Sequence[Sequence[Sentence]], slots: int, most: int
) -> list[set[int]]:
    """Of each passage the places of what is taken, its head with its first sentence: what fits, the best first.

    Where not even one fits into ``slots``, the best that fits into ``most`` is taken.
    """
    taken: list[set[int]] = [set() for _ in passages]
    left = slots
    for place, number in order:
        needed = passages[place][number].slots + (0 if taken[place] else passages[place][0].slots)
        if needed <= (left if any(taken) else max(slots, most)):
            taken[place] |= {0, number}
            left -= needed
    return taken


def read_spans(planned: PassagePlan) -> list[tuple[int, int]]:
    """First tokens and ends of what is read word for word of a passage, apart from each other."""
    spans: list[tuple[int, int]] = []
    for chunk in planned.chunks:
        if chunk.form != CHUNK_FORM_EXPANDED:
            continue
        if spans and spans[-1][1] == chunk.start_token:
            spans[-1] = (spans[-1][0], chunk.end_token)
        else:
            spans.append((chunk.start_token, chunk.end_token))
    return spans
