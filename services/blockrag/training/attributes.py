"""Questions made from a passage's own sentences: its attributes and its gaps.

The pattern questions of the data files know 17 relations. An attribute question names whatever noun the sentence
names ("Its official language is ..." gives "What is the official language of ...?"), and a gap question repeats a
sentence with a span left out. Both teach the reader to find words of the question in a passage and to copy what
stands beside them, whatever the relation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from blockrag.training.data import Question
from blockrag.training.passages import sentences

_NOUN = r"(?P<noun>[a-z]+(?: [a-z]+){0,2})"
_VALUE = r"(?P<value>[A-Z0-9$€£](?:[^.,;:()]|[.,](?=\d)){0,60}?)"
_STOP = r"(?=[.,](?!\d)|[;:()]| and | which | who | that | with | as of | in (?:\d|the) | at | from |$)"
_ATTRIBUTE = re.compile(
    rf"\b(?:[Ii]ts|[Hh]is|[Hh]er|[Tt]he|[Tt]heir) {_NOUN} (?:is|was|are|were) (?:the )?{_VALUE}{_STOP}"
)
_WITH = re.compile(
    rf"\b(?:has|have|had|having|with|covers|covering) an? {_NOUN} of (?:about |around |over )?{_VALUE}{_STOP}"
)
_SPAN = re.compile(r"(?<= )(?:[A-Z][\w'’-]+(?: (?:of |the )?[A-Z][\w'’-]+){0,3}|\d[\d,.]*\d|\d+)(?=[ ,.;)])")

_PRONOUN_NOUNS = frozenset(
    {"first", "second", "third", "same", "following", "other", "latter", "former", "time", "one"}
)
_ASKED = (
    "What is the {noun} of {title}?",
    "What was the {noun} of {title}?",
    "What is {title}'s {noun}?",
    "Which {noun} does {title} have?",
    "Tell me the {noun} of {title}.",
    "{title}: what is the {noun}?",
)
_AMOUNT = (
    "How large is the {noun} of {title}?",
    "What {noun} does {title} have?",
    "How much is the {noun} of {title}?",
)
_GAP = ("{title}: {left} ___ {right}", "Fill the gap: {left} ___ {right}", "{left} ___ {right}")


def attribute_questions(title: str, text: str, random: Random) -> Iterator[Question]:
    """Questions about attributes that ``text`` states with a noun and a value; the value is the answer."""
    for pattern in (_ATTRIBUTE, _WITH):
        for match in pattern.finditer(text):
            noun, value = match["noun"], match["value"].strip()
            if noun.split()[0] in _PRONOUN_NOUNS or value == title or len(value) < 2:
                continue
            amount = pattern is _WITH and value[0].isdigit() and random.random() < 0.5
            form = random.choice(_AMOUNT if amount else _ASKED)
            yield Question(form.format(noun=noun, title=title), (value,), "attribute")


def gap_question(title: str, text: str, random: Random, around: int = 7) -> Question | None:
    """A sentence of ``text`` with a name or number left out, at most ``around`` words on each side of the gap."""
    found = [sentence for sentence in sentences(text) if _SPAN.search(sentence)]
    if not found:
        return None
    sentence = random.choice(found)
    match = random.choice(list(_SPAN.finditer(sentence)))
    # The same span twice in a sentence leaves its own answer in the question.
    if sentence.count(match[0]) > 1 or match[0] in title:
        return None
    left = " ".join(sentence[: match.start()].split()[-around:])
    right = " ".join(sentence[match.end() :].split()[:around])
    return Question(random.choice(_GAP).format(title=title, left=left, right=right), (match[0],), "gap")
