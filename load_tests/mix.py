"""Which questions the users ask, and how they attend: seeded, so that two runs ask the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockrag.corpus.sample import Question

MODES = ("block", "full", "none")


@dataclass(frozen=True)
class Asked:
    """One question as a user asks it."""

    question: str
    article: str
    mode: str
    """block, full or none."""
    think_s: float
    """How long the user thinks before asking."""


@dataclass(frozen=True)
class Mix:
    """What all users have in common."""

    questions: tuple[Question, ...]
    seed: int = 0
    exponent: float = 1.1
    """Zipf's exponent over articles: 0 asks about all alike, 1.1 keeps a few hot and most cold."""
    mode_weights: Mapping[str, float] | None = None
    """Relative frequency of each attention mode; block alone when not given."""
    think_s: float = 1.0
    """Mean of the thinking time; exponential, at most five times this."""

    def of_user(self, number: int) -> Iterator[Asked]:
        """Everything that user ``number`` asks, without end."""
        chance = random.Random(f"{self.seed}/{number}")
        by_article = self._by_article()
        articles = self.articles()
        weights = list(itertools.accumulate((rank + 1) ** -self.exponent for rank in range(len(articles))))
        modes = dict(self.mode_weights or {"block": 1.0})
        while True:
            article = chance.choices(articles, cum_weights=weights)[0]
            yield Asked(
                question=chance.choice(by_article[article]),
                article=article,
                mode=chance.choices(list(modes), weights=list(modes.values()))[0],
                think_s=min(chance.expovariate(1 / self.think_s), 5 * self.think_s) if self.think_s else 0.0,
            )

    def articles(self) -> list[str]:
        """Articles from hot to cold: the same order for every user of a seed."""
        names = sorted({question.article for question in self.questions})
        random.Random(f"{self.seed}/articles").shuffle(names)
        return names

    def _by_article(self) -> dict[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for question in self.questions:
            found.setdefault(question.article, []).append(question.question)
        return {article: tuple(questions) for article, questions in found.items()}


def parse_weights(text: str) -> dict[str, float]:
    """Mode weights written as ``block=8,full=1,none=1``.

    Raises ``ValueError`` for an unknown mode, a negative weight or no weight at all.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        mode, _, weight = item.partition("=")
        if mode.strip() not in MODES:
            raise ValueError(f"{mode.strip()!r} is no attention mode: use {', '.join(MODES)}")
        weights[mode.strip()] = float(weight)
    if min(weights.values()) < 0 or not 0 < sum(weights.values()) < float("inf"):
        raise ValueError(f"{text!r}: weights must be positive")
    return weights
