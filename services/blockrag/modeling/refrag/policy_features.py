"""What a policy sees of a chunk beside its embedding: where it stands, what its tokens look like, and what it shares
with the question.

Everything is computed from token ids, in numpy, in well under a millisecond for twenty passages. A question's tokens
are weighted by how few of the candidates hold them (BM25's inverse document frequency over the candidates alone): the
name that one passage holds counts, the "was" that all hold does not. No statistics of a corpus are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLACE_FEATURES = ("rank", "inverse rank", "place", "inverse place", "last of its passage", "length")
"""Known without the question: where a chunk stands in the sequence."""
QUESTION_FEATURES = (
    "digits",
    "capitals",
    "passage's overlap",
    "passage's overlap relative to the best",
    "inverse rank by overlap",
    "passage's overlap in pairs of tokens",
    "chunk's overlap",
    "overlap of the chunk before",
    "overlap of the chunk after",
    "in the passage of the largest overlap",
    "inverse place there",
    "place there",
)
FEATURES = (*PLACE_FEATURES, *QUESTION_FEATURES)
"""Names of the columns that ``chunk_features`` gives."""

_WORD_STARTS = "Ġ▁ "
_DIGITS = frozenset("0123456789")
_CAPITALS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class TokenTraits:
    """What tokens look like, by id; bool [vocabulary]."""

    digit: NDArray[np.bool_]
    """Whether there is a digit in it."""
    capital: NDArray[np.bool_]
    """Whether it begins with a capital letter."""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenTraits:
        """Of a transformers fast tokenizer; computed once, it reads the whole vocabulary."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        size = max(vocabulary.values(), default=-1) + 1
        digit, capital = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
        for text, number in vocabulary.items():
            digit[number] = not _DIGITS.isdisjoint(text)
            capital[number] = text.lstrip(_WORD_STARTS)[:1] in _CAPITALS
        return cls(digit, capital)


def policy_ranks(sees_question: bool, retrieved: Sequence[int]) -> tuple[int, ...]:
    """Each passage's rank as a policy is to see it, from the place that retrieval gave it (0 the best).

    Retrieval has seen the question, so a policy that does not see it is given places in the prompt alone: the last
    passage, the nearest to what follows, is 0. Training, serving and evaluation all rank by this.
    """
    return tuple(retrieved if sees_question else range(len(retrieved))[::-1])


def chunk_features(
    passages: Sequence[Sequence[int]],
    question: Sequence[int],
    chunk_tokens: int,
    traits: TokenTraits,
    ranks: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Features of every chunk of every passage, in order; float32 [chunks, len(FEATURES)], all from 0 to about 1.

    ``passages`` are the token ids of the passages' blocks, ``question`` those of the final block (empty: what depends
    on it is 0). ``ranks[i]`` is the place that retrieval gave passage i, 0 the best; None: passages come in that
    order. Raises ValueError for an empty passage.
    """
    lengths = np.array([len(passage) for passage in passages], dtype=np.int64)
    if not len(lengths):
        return np.zeros((0, len(FEATURES)), dtype=np.float32)
    if chunk_tokens < 1 or lengths.min() < 1:
        raise ValueError("a chunk and a passage have at least one token")
    counts = -(-lengths // chunk_tokens)
    owner = np.repeat(np.arange(len(lengths)), counts)
    first_chunks = np.cumsum(counts) - counts
    index = np.arange(len(owner)) - first_chunks[owner]
    starts = (np.cumsum(lengths) - lengths)[owner] + index * chunk_tokens
    sizes = np.minimum(lengths[owner] - index * chunk_tokens, chunk_tokens)
    tokens = np.fromiter(chain.from_iterable(passages), dtype=np.int64, count=int(lengths.sum()))
    rank = (np.arange(len(lengths)) if ranks is None else np.asarray(ranks, dtype=np.int64))[owner]
    columns = [
        np.log1p(rank) / 3.0,
        1.0 / (1.0 + rank),
        index / np.maximum(counts[owner] - 1, 1),
        1.0 / (1.0 + index),
        index == counts[owner] - 1,
        sizes / chunk_tokens,
        np.add.reduceat(_look_up(traits.digit, tokens), starts) / sizes,
        np.add.reduceat(_look_up(traits.capital, tokens), starts) / sizes,
        *_overlaps(
            tokens,
            np.asarray(question, dtype=np.int64),
            first_chunks,
            np.repeat(np.arange(len(owner)), sizes),
            owner,
        ),
    ]
    # what the passage asked about is read from its beginning on: given as products, which a small network learns late
    best = columns[FEATURES.index("inverse rank by overlap")] == 1.0
    columns += [best, best / (1.0 + index), best * np.minimum(index / 16.0, 1.0)]
    features = np.empty((len(owner), len(FEATURES)), dtype=np.float32)
    for number, column in enumerate(columns):
        features[:, number] = column
    return features


def _look_up(trait: NDArray[np.bool_], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    if tokens.max() >= len(trait):  # a decoder may have more rows than its tokenizer has tokens
        trait = np.pad(trait, (0, int(tokens.max()) + 1 - len(trait)))
    found: NDArray[np.float32] = trait[tokens].astype(np.float32)
    return found


def _overlaps(
    tokens: NDArray[np.int64],
    question: NDArray[np.int64],
    first_chunks: NDArray[np.int64],
    chunk_of: NDArray[np.int64],
    owner: NDArray[np.int64],
) -> list[NDArray[np.float64]]:
    """Seven columns: overlaps as shares of the question's whole weight; zero where it has none.

    ``first_chunks`` [passages]: the first chunk of each; ``chunk_of`` [tokens]: the chunk that a token stands in.
    """
    chunks, passages = len(owner), len(first_chunks)
    if not question.size:
        return [np.zeros(chunks)] * 7
    # few tokens stand in the question at all: only those are compared with each of its tokens
    places = np.flatnonzero(np.isin(tokens, question, kind="table"))
    found, column = np.divmod(np.flatnonzero(tokens[places, None] == question[None, :]), question.size)
    place = places[found]
    own_held = np.zeros((chunks, question.size), dtype=np.bool_)
    own_held[chunk_of[place], column] = True
    held = np.logical_or.reduceat(own_held, first_chunks, axis=0)
    weight = _rarity(held, passages)
    first_places = {token: place for place, token in reversed(list(enumerate(question.tolist())))}
    once = np.zeros(question.size, dtype=np.bool_)  # a token that stands twice in the question counts once
    once[list(first_places.values())] = True
    weight *= once
    total = weight.sum()
    if not total:
        return [np.zeros(chunks)] * 7
    whole = held @ weight / total
    best = whole.max()
    order = (whole[None, :] > whole[:, None]).sum(axis=1)
    own = own_held @ weight / total
    before, after = np.zeros(chunks), np.zeros(chunks)
    before[1:], after[:-1] = own[:-1], own[1:]
    before[first_chunks] = after[first_chunks - 1] = 0.0  # the chunk before the first is the last, of its own passage
    return [
        whole[owner],
        whole[owner] / best if best else np.zeros(chunks),
        1.0 / (1.0 + order[owner]),
        _pairs(place, column, owner[chunk_of[place]], question.size, passages)[owner],
        own,
        before,
        after,
    ]


def _pairs(
    place: NDArray[np.int64],
    column: NDArray[np.int64],
    passage: NDArray[np.int64],
    question_tokens: int,
    passages: int,
) -> NDArray[np.float64]:
    """Overlap of each passage with the question's pairs of neighbouring tokens, relative to the best.

    The question's token ``column[i]`` stands at ``place[i]`` among all tokens, in ``passage[i]``.
    """
    if question_tokens < 2 or not place.size:
        return np.zeros(passages)
    # one number for each (place, column); both grow by one from a pair's first token to its second
    numbers = place * question_tokens + column
    follower = np.minimum(np.searchsorted(numbers, numbers + question_tokens + 1), len(numbers) - 1)
    followed = (numbers[follower] == numbers + question_tokens + 1) & (column < question_tokens - 1)
    followed &= passage[follower] == passage
    held = np.zeros((passages, question_tokens - 1), dtype=np.bool_)
    held[passage[followed], column[followed]] = True
    found: NDArray[np.float64] = held @ _rarity(held, passages)
    return found / found.max() if found.max() else found


def _rarity(held: NDArray[np.bool_], passages: int) -> NDArray[np.float64]:
    """BM25's inverse document frequency of each column of ``held`` [passages, tokens]; 0 where none holds it."""
    holders = held.sum(axis=0)
    weight: NDArray[np.float64] = np.log1p((passages - holders + 0.5) / (holders + 0.5)) * (holders > 0)
    return weight
