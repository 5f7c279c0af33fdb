"""Two questions asked as one, whose answers stand in two passages.

Both are of one relation and one table, so that the other articles of that table are distractors for either.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from itertools import product
from random import Random

from blockrag.errors import SetupError
from blockrag.evaluation.question_data import QuestionData, SourceQuestion
from blockrag.evaluation.scoring import contains


def in_pairs(data: QuestionData, seed: int = 0) -> QuestionData:
    """The questions of ``data`` by twos, each in one pair at most; in an order by ``seed``.

    Raises ``SetupError`` where no two go together.
    """
    waiting: defaultdict[tuple[str, tuple[int, ...]], list[SourceQuestion]] = defaultdict(list)
    pairs = []
    for question in data.questions:
        if not (question.group and question.same_kind and question.gold and question.answers):
            continue
        others = waiting[question.group, question.same_kind]
        other = next((one for one in others if _apart(data, one, question)), None)
        if other is None:
            others.append(question)
        else:
            others.remove(other)
            pairs.append(_joined(other, question))
    if not pairs:
        raise SetupError(f"{data.name}: no two questions of one relation and one table (--pairs)")
    Random(seed).shuffle(pairs)  # they were found in large tables first
    return replace(data, name=f"{data.name}, pairs", questions=pairs)


def _apart(data: QuestionData, first: SourceQuestion, second: SourceQuestion) -> bool:
    """Whether neither question's passages hold an answer to the other, which its own do."""
    return not any(
        contains(data.passages[number].text, other.answers)
        for one, other in ((first, second), (second, first))
        for number in one.gold
    )


def _joined(first: SourceQuestion, second: SourceQuestion) -> SourceQuestion:
    opening = re.sub("[?.]$", "", first.text)
    return SourceQuestion(
        id=f"{first.id} {second.id}",
        text=f"{opening}, and {second.text[:1].lower()}{second.text[1:]}",
        answers=tuple(" and ".join(both) for both in product(first.answers, second.answers)),
        gold=(*first.gold, *second.gold),
        same_kind=first.same_kind,
        group=first.group,
        asks=(first, second),
    )
