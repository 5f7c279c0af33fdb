"""Which chunks a training prompt shows word for word.

A mask is one bool array per passage, one value per chunk, true where the chunk is expanded. Budgets are counted in
slots, as the compressor counts them: a compressed chunk takes one, an expanded one its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from blockrag.budget import chunk_bounds, chunk_count, chunk_lengths, expand_in_order, room_for
from blockrag.training.adaptation.batch import Branch

Mask = tuple[NDArray[np.bool_], ...]
Place = tuple[int, int]
"""Number of a passage, and of a chunk in it."""


def constant_mask(passages: Sequence[Sequence[int]], k: int, expanded: bool) -> Mask:
    """Every chunk expanded, or none."""
    return tuple(np.full(chunk_count(len(passage), k), expanded) for passage in passages)


def fill_budget(passages: Sequence[Sequence[int]], k: int, rate: float, order: Iterable[Place]) -> Mask:
    """Expand chunks in ``order``, up to the first with which fewer than ``rate`` tokens would stand for a slot."""
    sizes = list(map(len, passages))
    ends = np.cumsum([chunk_count(size, k) for size in sizes])
    firsts = [0, *ends[:-1].tolist()]
    places = dict.fromkeys(firsts[passage] + chunk for passage, chunk in order)
    mask = expand_in_order(list(places), chunk_lengths(sizes, k), room_for(sizes, k, "rate", rate).extra_slots)
    return tuple(np.split(mask, ends[:-1]))


def all_places(passages: Sequence[Sequence[int]], k: int, order: Sequence[int] | None = None) -> list[Place]:
    """Every chunk, passage by passage in ``order``; None: in the prompt's."""
    numbers = range(len(passages)) if order is None else order
    return [(number, chunk) for number in numbers for chunk in range(chunk_count(len(passages[number]), k))]


def passage_ranking(passages: Sequence[Sequence[int]], question: Sequence[int]) -> list[int]:
    """Passages by how many of the question's tokens they hold, each token worth the less, the more passages hold it."""
    inside = [set(passage) for passage in passages]
    spread = Counter(token for tokens in inside for token in tokens)
    asked = set(question)
    scores = [sum(1 / spread[token] for token in asked & tokens) for tokens in inside]
    return sorted(range(len(passages)), key=lambda number: -scores[number])


def answer_places(passages: Sequence[Sequence[int]], branch: Branch, k: int) -> list[Place]:
    """Chunks that the answer stands in, in the passage that shares most with the question; empty where it is in none.

    The same answer often stands in several passages of a kind ("American"); only one of them is asked about.
    """
    wanted = tuple(branch.answer[:-1])
    for number in passage_ranking(passages, branch.prompt):
        found = _find(passages[number], wanted)
        if found is not None:
            bounds = chunk_bounds(len(passages[number]), k)
            return [(number, c) for c, (start, end) in enumerate(bounds) if start < found + len(wanted) and end > found]
    return []


def question_order(passages: Sequence[Sequence[int]], branch: Branch, k: int) -> list[Place]:
    """A simple choice that sees the question and not the answer: the best passages whole, one after another."""
    return all_places(passages, k, passage_ranking(passages, branch.prompt))


def view_slots(
    full: Sequence[NDArray[np.int64] | None],
    compressed: Sequence[NDArray[np.int64] | None],
    mask: Sequence[NDArray[np.bool_]],
    k: int,
) -> list[NDArray[np.int64]]:
    """Slots of each passage under ``mask``, from its full block's and its compressed block's slots."""
    composed = []
    for number, expanded in enumerate(mask):
        pieces = []
        for chunk, shown in enumerate(expanded):
            whole, short = full[number], compressed[number]
            if shown:
                assert whole is not None
                pieces.append(whole[chunk * k : (chunk + 1) * k])
            else:
                assert short is not None
                pieces.append(short[chunk : chunk + 1])
        composed.append(np.concatenate(pieces))
    return composed


class MaskSampler:
    """Draws masks for tuning: from nothing to nearly everything expanded, mostly as a good policy would choose."""

    informed = 0.8
    """Share of masks that imitate a policy; the others are random."""
    with_answer = 0.9
    """Chance of an answer's chunks to be expanded in these; else a neighbour may tell, or nothing does."""
    nothing = 0.05
    """Share of masks with every chunk compressed."""

    def __init__(self, k: int, expanded: float) -> None:
        """``expanded``: share of masks with every chunk expanded."""
        self._k = k
        self._expanded = expanded

    def draw(self, passages: Sequence[Sequence[int]], branches: Sequence[Branch], random: Random) -> Mask:
        """A mask for questions that are asked together."""
        drawn = random.random()
        if drawn < self._expanded:
            return constant_mask(passages, self._k, True)
        if drawn < self._expanded + self.nothing:
            return constant_mask(passages, self._k, False)
        rate = random_rate(self._k, random)
        return fill_budget(passages, self._k, rate, self._order(passages, branches, random))

    def _order(self, passages: Sequence[Sequence[int]], branches: Sequence[Branch], random: Random) -> Iterator[Place]:
        places = all_places(passages, self._k)
        random.shuffle(places)
        if random.random() < self.informed:
            asked = random.sample(list(branches), len(branches))
            for branch in asked:
                if random.random() < self.with_answer:
                    yield from answer_places(passages, branch, self._k)
            openings = [(number, 0) for number in range(len(passages))]
            whole = [place for branch in asked for place in self._passage(passages, branch)]
            # a policy may open the passage asked about, or every title, or both in turn
            yield from {0: whole, 1: openings + whole, 2: []}[random.choices((0, 1, 2), (4, 2, 2))[0]]
        yield from places

    def _passage(self, passages: Sequence[Sequence[int]], branch: Branch) -> list[Place]:
        found = answer_places(passages, branch, self._k)
        if not found:
            return []
        number, near = found[0]
        chunks = range(chunk_count(len(passages[number]), self._k))
        return sorted(((number, chunk) for chunk in chunks), key=lambda place: abs(place[1] - near))


def random_rate(k: int, random: Random) -> float:
    """A rate from nearly 1 to k; as many between 2 and 4 as between 4 and 8."""
    return float(k ** random.uniform(0.15, 1.0))


def _find(tokens: Sequence[int], wanted: tuple[int, ...]) -> int | None:
    """Place of the first occurrence of ``wanted``."""
    if not wanted:
        return None
    for start in range(len(tokens) - len(wanted) + 1):
        if tokens[start] == wanted[0] and tuple(tokens[start : start + len(wanted)]) == wanted:
            return start
    return None
