"""Questions about the almanac, drawn from the statements that its articles are made of."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from blockrag.corpus.almanac.articles import SEED, WrittenArticle
from blockrag.corpus.almanac.writing import Statement

WORDINGS: dict[str, tuple[str, ...]] = {
    "is_a": ("What is {about}?", "Describe {about} briefly."),
    "located": ("Where is {about} located?",),
    "known_as": ("What is {about} also known as?",),
    "population": ("What is the population of {about}?",),
    "capital": ("What is the capital of {about}?",),
    "capital_of": ("Of what is {about} the capital?",),
    "nationality": ("What is the nationality of {about}?", "What nationality is {about}?"),
    "founded": ("When was {about} founded?", "In what year was {about} established?"),
    "written": ("Who wrote {about}?",),
    "capacity": ("What is the electricity generating capacity of {about}?",),
    "area": ("What is the area of {about}?", "What is the total area of {about}?"),
    "currency": ("What is the currency of {about}?", "What currency is used in {about}?"),
    "independence": ("When did {about} become independent?",),
    "highest_point": ("What is the highest point of {about}?",),
    "official_language": ("What is the official language of {about}?",),
    "anthem": ("What is the national anthem of {about}?",),
    "internet_code": ("What is the internet country code of {about}?",),
    "chief_of_state": ("Who is the chief of state of {about}?",),
    "head_of_government": ("Who is the head of government of {about}?",),
    "national_holiday": ("When is the national holiday of {about}?",),
    "life_expectancy": ("What is the life expectancy in {about}?",),
    "export_partner": ("What is the largest export partner of {about}?",),
    "coastline": ("How long is the coastline of {about}?",),
    "religion": ("What is the main religion of {about}?",),
    "legislature": ("What is the legislature of {about}?",),
    "national_symbol": ("What is the national symbol of {about}?",),
    "largest_city": ("What is the largest urban area of {about}?",),
}
"""Wordings by relation. The first ten are plain, the others ask in other words than the articles use."""

QUOTAS: dict[str, int] = {
    "is_a": 20,
    "located": 28,
    "known_as": 20,
    "population": 30,
    "capital": 22,
    "capital_of": 24,
    "nationality": 20,
    "founded": 14,
    "written": 16,
    "capacity": 8,
    "area": 14,
    "currency": 12,
    "independence": 12,
    "highest_point": 10,
    "official_language": 8,
    "anthem": 6,
    "internet_code": 5,
    "chief_of_state": 5,
    "head_of_government": 4,
    "national_holiday": 4,
    "life_expectancy": 4,
    "export_partner": 3,
    "coastline": 3,
    "religion": 2,
    "legislature": 2,
    "national_symbol": 2,
    "largest_city": 2,
}
"""How many questions of each relation; 300 in all, two thirds of them in forms that the reader knows."""


@dataclass(frozen=True)
class DraftQuestion:
    """A question before it has its number."""

    question: str
    answers: tuple[str, ...]
    article: str
    relation: str


def draw_questions(articles: Sequence[WrittenArticle], seed: int = SEED) -> list[dict[str, object]]:
    """The question set: `QUOTAS` questions of each relation, spread evenly over the articles.

    A question is only drawn where no second article could answer it: what it asks about is unique in its relation.

    Raises:
        ValueError: the articles hold too few statements of some relation.
    """
    by_relation: dict[str, list[tuple[WrittenArticle, Statement]]] = defaultdict(list)
    for article in articles:
        for statement in article.statements:
            if statement.relation in QUOTAS:
                by_relation[statement.relation].append((article, statement))
    used: Counter[str] = Counter()
    drafts: list[DraftQuestion] = []
    # The scarcest relations choose first, so that they do not have to share articles with the common ones.
    for relation in sorted(QUOTAS, key=lambda name: (len(by_relation[name]), name)):
        candidates = _unique(by_relation[relation])
        if len(candidates) < QUOTAS[relation]:
            raise ValueError(f"only {len(candidates)} statements for {QUOTAS[relation]} questions of {relation}")
        candidates.sort(key=lambda pair: _rank(seed, relation, pair[0].id, pair[1].about))
        for _ in range(QUOTAS[relation]):
            article, statement = min(candidates, key=lambda pair: used[pair[0].id])
            candidates.remove((article, statement))
            used[article.id] += 1
            wordings = WORDINGS[relation]
            wording = wordings[_rank(seed, "wording", article.id, statement.about) % len(wordings)]
            question = wording.format(about=statement.about)
            drafts.append(DraftQuestion(question, statement.answers, article.id, relation))
    drafts.sort(key=lambda draft: _rank(seed, "order", draft.article, draft.question))
    return [
        {
            "id": f"almanac-{number:03d}",
            "question": draft.question,
            "answers": list(draft.answers),
            "article": draft.article,
            "relation": draft.relation,
        }
        for number, draft in enumerate(drafts, 1)
    ]


def _unique(pairs: list[tuple[WrittenArticle, Statement]]) -> list[tuple[WrittenArticle, Statement]]:
    seen = Counter(statement.about.casefold() for _, statement in pairs)
    return [pair for pair in pairs if seen[pair[1].about.casefold()] == 1]


def _rank(seed: int, *parts: str) -> int:
    digest = hashlib.sha256("/".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
