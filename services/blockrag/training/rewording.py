"""Questions in other words than the sentence that answers them.

A gap in a sentence can be filled by finding the words beside it in a passage. People ask with some of a sentence's
words, in another order, in other forms, and with words that are not there at all; so do these questions, without
being grammatical: words are left out, put in another order and replaced by related ones, a pronoun by what the text is
about (noise on cloze questions: arXiv 1906.04980, section 2.3.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random

from blockrag.training.cloze import FUNCTION_WORDS, NUMBER, cloze_question, is_date, pick_span, question_word
from blockrag.training.data import Question
from blockrag.training.mixture import Mixture

RelatedWords = Mapping[str, tuple[str, ...]]
"""Words with others that mean nearly the same."""

_PRONOUN = re.compile(r"(?:He|She|It|They|he|she|it|they)$")
_POSSESSIVE = re.compile(r"(?:His|Her|Its|Their|his|her|its|their)$")
_EDGE = re.compile(r"^[^\w$%]+|[^\w%]+$")
_NOUN_AFTER = re.compile(r" ([a-z]{3,})\b")
_HELPERS = {
    "when": ("did", "was", "were", "is"),
    "where": ("did", "was", "is", "does", "are"),
    "who": ("was", "is", "", "did"),
    "how many": ("", "", "are there", "did", "were"),
    "how much": ("", "did", "was", "is"),
}
_OTHER_HELPERS = ("did", "was", "is", "does", "are", "")
_MOST_WORDS = 14


class SentenceAsker:
    """Asks about the sentences of a passage, in their words and in others."""

    def __init__(self, mixture: Mixture, related: RelatedWords) -> None:
        self._mixture = mixture
        self._related = related

    def questions(self, title: str, text: str, random: Random) -> list[Question]:
        """About ``Mixture.cloze`` questions with different answers that stand in ``text``."""
        found: dict[str, Question] = {}
        for _ in range(int(self._mixture.cloze + random.random())):
            picked = pick_span(title, text, random)
            if picked is None:
                continue
            sentence, span = picked
            if random.random() < self._mixture.reworded:
                question = reworded_question(sentence, span, title, self._related, random)
            else:
                question = cloze_question(sentence, span, title, random)
            if question is not None:
                found.setdefault(span[0], question)
        return list(found.values())


def reworded_question(
    sentence: str, span: re.Match[str], title: str, related: RelatedWords, random: Random
) -> Question | None:
    """A question for ``span`` from some of the sentence's words; None where too few are left of them."""
    left, right = _words(sentence[: span.start()], title, random), _words(sentence[span.end() :], title, random)
    asked = question_word(sentence, span, random)
    if NUMBER.fullmatch(span[0]) and not is_date(span[0]) and asked.startswith("how many"):
        counted = _NOUN_AFTER.match(sentence, span.end())
        if counted and counted[1] not in FUNCTION_WORDS:
            asked, right = f"how many {counted[1]}", right[1:]
    left, right = left[-random.randint(4, 10) :], right[: random.randint(4, 10)]
    kept_share = random.uniform(0.5, 1.0)
    replaced_share = random.choice((0.0, 0.15, 0.35))

    def reword(words: list[str]) -> list[str]:
        kept = [w for w in words if random.random() < (kept_share if w.lower() not in FUNCTION_WORDS else 0.5)]
        return [
            random.choice(related[word]) if word in related and random.random() < replaced_share else word
            for word in kept
        ]

    left, right = reword(left), reword(right)
    answer_words = {word.lower() for word in span[0].split()}
    content = {word.lower() for word in (*left, *right)} - FUNCTION_WORDS
    if len(content) < 2 or content & answer_words:
        return None
    return Question(_put_together(asked, left, right, title, random), (span[0],), "reworded")


def _words(part: str, title: str, random: Random) -> list[str]:
    """Words without the marks around them; pronouns become the title most of the time."""
    words: list[str] = []
    for raw in part.split():
        word = _EDGE.sub("", raw)
        if _PRONOUN.match(word) and random.random() < 0.7:
            words.append(title)
        elif _POSSESSIVE.match(word) and random.random() < 0.7:
            words.append(f"{title}'s")
        elif word:
            words.append(word)
    return words


def _put_together(asked: str, left: list[str], right: list[str], title: str, random: Random) -> str:
    """Question word, helper and both sides in one of the orders that questions have."""
    first = asked.split()[0]
    helper = random.choice(_HELPERS.get(asked, _HELPERS.get(first, _OTHER_HELPERS))) if random.random() < 0.6 else ""
    order = random.random()
    if order < 0.55:
        words = [asked, helper, *left, *right]
    elif order < 0.75:
        words = [asked, helper, *right, *left]
    elif order < 0.9:
        words = [*left, asked, *right]
    else:
        shuffled = [*left, *right]
        random.shuffle(shuffled)
        words = [asked, helper, *shuffled]
    words = [word for word in words if word][:_MOST_WORDS]
    if random.random() < 0.15 and title not in words:
        words += [random.choice(("in", "of", "for")), title]
    text = " ".join(words)
    return text[:1].upper() + text[1:] + "?"
