"""Questions about the attributes that a passage states.

The pattern questions of the data files know 17 relations. An attribute question names whatever noun the sentence
names: "Its official language is ..." gives "What is the official language of ...?".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from blockrag.training.data import Question

_NOUN = r"(?P<noun>[a-z]+(?: [a-z]+){0,2})"
_VALUE = r"(?P<value>[A-Z0-9$€£](?:[^.,;:()]|[.,](?=\d)){0,60}?)"
_STOP = r"(?=[.,](?!\d)|[;:()]| and | which | who | that | with | as of | in (?:\d|the) | at | from |$)"
_ATTRIBUTE = re.compile(
    rf"\b(?:[Ii]ts|[Hh]is|[Hh]er|[Tt]he|[Tt]heir) {_NOUN} (?:is|was|are|were) (?:the )?{_VALUE}{_STOP}"
)
_WITH = re.compile(
    rf"\b(?:has|have|had|having|with|covers|covering) an? {_NOUN} of (?:about |around |over )?{_VALUE}{_STOP}"
)

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
