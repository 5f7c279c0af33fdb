"""Questions made from a sentence by leaving a span of it out.

Written as a gap ("... was built in ___ by ..."), or as a question by putting a question word where the span stood
(unsupervised question answering by cloze translation, arXiv 1906.04980, section 2.3, with rules for the question word
in place of an entity tagger). Both teach the reader to find the words of a question in a passage and to copy what
stands among them.
"""

from __future__ import annotations

import re
from random import Random

from blockrag.training.data import Question
from blockrag.training.passages import sentences

FUNCTION_WORDS = frozenset(
    """
    a about after against all also although am among an and any are as at be became because been before being
    between both but by can could did do does during each few for from had has have he her here him his how i if in
    into is it its just like made many may me might more most much must my no nor not of off on one only or other
    our out over own s same she should so some such t than that the their them then there these they this those
    through to too under until up upon us very was we were what when where which while who whom whose why will with
    would you your
    """.split()  # noqa: SIM905 - a hundred quoted words are harder to read
)
NAME = re.compile(r"(?<![\w.])(?:[A-Z][\w'’-]+(?: (?:of |the |de |von )?[A-Z][\w'’-]+){0,3})")
NUMBER = re.compile(r"(?<![\w.,])\$?\d[\d,.]*\d%?|(?<![\w.,])\$?\d%?(?![\w,.]\d)")
_DATE = re.compile(
    r"(?:\d{1,2} )?(?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"(?: \d{1,2}\b(?:, \d{4})?)?(?: \d{4})?"
)
_YEAR = re.compile(r"1\d{3}|20\d{2}")
_WORD = re.compile(r"[A-Za-z][a-z'’-]*")
_PLACE_BEFORE = re.compile(r"\b(?:in|at|near|to|from) (?:the )?$")
_GAP = ("{title}: {left} ___ {right}", "Fill the gap: {left} ___ {right}", "{left} ___ {right}")


def is_date(text: str) -> bool:
    """Whether ``text`` is a date or a year as a whole."""
    return bool(_DATE.fullmatch(text) or _YEAR.fullmatch(text))


def answer_spans(sentence: str) -> list[re.Match[str]]:
    """Spans of a sentence that a question could ask for: names, dates, numbers, and short runs of content words."""
    found: list[re.Match[str]] = []
    taken: list[tuple[int, int]] = []
    for pattern in (_DATE, NAME, NUMBER):
        for match in pattern.finditer(sentence):
            # A sentence's first word is capitalised whatever it is.
            if match.start() == 0 and match[0].lower() in FUNCTION_WORDS:
                continue
            if all(match.end() <= start or match.start() >= end for start, end in taken):
                found.append(match)
                taken.append(match.span())
    return found + [m for m in _content_runs(sentence) if all(m.end() <= a or m.start() >= b for a, b in taken)]


def _content_runs(sentence: str) -> list[re.Match[str]]:
    """Runs of one to three content words that stand between function words or marks."""
    runs: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for match in _WORD.finditer(sentence):
        content = match[0].lower() not in FUNCTION_WORDS and len(match[0]) > 2
        adjacent = run and sentence[run[-1].end() : match.start()] == " "
        if content and (adjacent or not run):
            run.append(match)
            continue
        runs += _joined(sentence, run)
        run = [match] if content else []
    return runs + _joined(sentence, run)


def _joined(sentence: str, run: list[re.Match[str]]) -> list[re.Match[str]]:
    if not 1 <= len(run) <= 3:
        return []
    whole = re.compile(re.escape(sentence[run[0].start() : run[-1].end()])).match(sentence, run[0].start())
    return [whole] if whole else []


def question_word(sentence: str, span: re.Match[str], random: Random) -> str:
    """A question word for what the span seems to be."""
    text = span[0]
    if _DATE.fullmatch(text):
        return random.choice(("when", "what date", "when"))
    if _YEAR.fullmatch(text):
        return random.choice(("when", "what year", "which year"))
    if NUMBER.fullmatch(text):
        if "$" in text or "%" in text:
            return random.choice(("how much", "what"))
        return random.choice(("how many", "how many", "what number"))
    if text[0].isupper() and span.start() > 0:
        if _PLACE_BEFORE.search(sentence[: span.start()]):
            return random.choice(("where", "what place", "which place", "what"))
        return random.choice(("who", "who", "what", "which"))
    return "what"


def cloze_question(sentence: str, span: re.Match[str], title: str, random: Random, around: int = 9) -> Question:
    """The sentence with ``span`` asked for; at most ``around`` words on each side of it are kept."""
    left = sentence[: span.start()].split()[-around:]
    right = sentence[span.end() :].rstrip(" .!?;:").split()[:around]
    if random.random() < 0.3:
        form = random.choice(_GAP)
        return Question(form.format(title=title, left=" ".join(left), right=" ".join(right)).strip(), (span[0],), "gap")
    word = question_word(sentence, span, random)
    left, right = _clause(left, right)
    if random.random() < 0.4:
        left, right = ([w for w in side if random.random() > 0.12] for side in (left, right))
    if len(right) >= 3 and (not left or random.random() < 0.3):
        words = [word, *right, *(["in", title] if random.random() < 0.1 else [])]
    elif len(left) >= 3 and random.random() < 0.35:
        words = [word, *left, *right]
    else:
        words = [*left, word, *right]
    text = " ".join(words).strip(" ,;:-")
    return Question(text[:1].upper() + text[1:] + "?", (span[0],), "cloze")


def _clause(left: list[str], right: list[str]) -> tuple[list[str], list[str]]:
    """The clause around the gap, where enough words are left of it."""
    begin = next((n + 1 for n in range(len(left) - 1, -1, -1) if left[n][-1] in ",;:"), 0)
    end = next((n + 1 for n, word in enumerate(right) if word[-1] in ",;:"), len(right))
    if len(left) - begin + end >= 5:
        left, right = left[begin:], [*right[:end]]
        if right:
            right[-1] = right[-1].rstrip(",;:")
    return left, right


def pick_span(title: str, text: str, random: Random) -> tuple[str, re.Match[str]] | None:
    """A sentence of ``text`` and a span of it to ask for, which stands in neither title nor sentence again."""
    found = [s for s in sentences(text) if 5 <= len(s.split()) <= 45]
    if not found:
        return None
    sentence = random.choice(found)
    spans = [m for m in answer_spans(sentence) if m[0] not in title and sentence.count(m[0]) == 1]
    if not spans:
        return None
    # Names, dates and numbers are what people mostly ask for; the runs of content words come after them in the list.
    strong = [m for m in spans if m[0][0].isupper() or m[0][0].isdigit() or m[0][0] == "$"]
    return sentence, random.choice(strong if strong and random.random() < 0.6 else spans)
