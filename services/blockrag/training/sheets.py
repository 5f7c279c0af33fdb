"""Contexts made up from nothing: fact sheets about invented things, and key-value look-ups.

The facts are drawn at random, so nothing but the passages can answer. A thing's facts are spread over several passages
with the same title, beside other things with the same kinds of facts: which passage answers depends on both the thing
and the kind of fact.
"""

from __future__ import annotations

from random import Random

from blockrag.training.cloze import NAME
from blockrag.training.data import Article, ReaderData
from blockrag.training.drafts import BatchShape, Cutter, Draft
from blockrag.training.mixture import Mixture

_NAMED = (
    "capital", "largest city", "official language", "currency", "highest point", "longest river",
    "head of government", "chief of state", "president", "mayor", "founder", "owner", "director", "architect",
    "main export", "national dish", "national anthem", "patron saint", "main religion", "largest lake", "main port",
    "nearest town", "headquarters", "chairman", "captain", "coach", "home ground", "record holder", "main sponsor",
    "publisher", "editor", "translator", "main character", "producer", "composer", "successor", "predecessor",
    "parent company", "chief engineer", "nickname", "motto", "flag carrier", "main industry", "principal crop",
    "oldest building", "largest employer", "time zone", "type of government", "lowest point",
    "neighbour to the north", "source", "mouth", "manufacturer", "designer",
)  # fmt: skip
_AMOUNTS = (
    ("population", ""), ("area", " square kilometres"), ("height", " metres"), ("length", " kilometres"),
    ("capacity", ""), ("number of members", ""), ("number of employees", ""), ("annual budget", " million"),
    ("median age", " years"), ("life expectancy", " years"), ("literacy rate", " percent"),
    ("coastline", " kilometres"), ("electricity generating capacity", " kilowatts"), ("number of airports", ""),
    ("birth rate", " per thousand"), ("unemployment rate", " percent"), ("number of rooms", ""),
    ("depth", " metres"), ("weight", " kilograms"), ("price", " dollars"), ("top speed", " kilometres per hour"),
    ("mean elevation", " metres"), ("crew", ""),
)  # fmt: skip
_YEARS = ("founded", "built", "opened", "closed", "established", "rebuilt", "renamed", "sold", "first mentioned")
_STATED = (
    "The {noun} of {title} is {value}.", "Its {noun} is {value}.", "{title} has {value} as its {noun}.",
    "{value} is the {noun} of {title}.", "The {noun} is {value}.", "{noun}: {value}.", "{title}'s {noun} is {value}.",
)  # fmt: skip
_ASKED = (
    "What is the {noun} of {title}?", "What is the {noun} of {title}?", "What is {title}'s {noun}?",
    "Which {noun} does {title} have?", "Tell me the {noun} of {title}.", "{title}: {noun}?",
    "What {noun} is used in {title}?",
)  # fmt: skip
_PERSON_ASKED = ("Who is the {noun} of {title}?", "Who is {title}'s {noun}?", "Name the {noun} of {title}.")
_PEOPLE = frozenset((
    "head of government", "chief of state", "president", "mayor", "founder", "owner", "director", "architect",
    "chairman", "captain", "coach", "record holder", "publisher", "editor", "translator", "main character",
    "producer", "composer", "successor", "predecessor", "chief engineer", "designer",
))  # fmt: skip
_AMOUNT_ASKED = (
    "What is the {noun} of {title}?", "How large is the {noun} of {title}?", "What is {title}'s {noun}?",
    "How much is the {noun} of {title}?", "{title}: {noun}?",
)  # fmt: skip
_KEY_PASSAGES = ("Record {n}", "Table {n}", "Keys {n}", "Part {n}")
_KEY_ASKED = (
    "What is the value of {key}?", "Which value belongs to the key {key}?", "Extract the value of {key}.", "{key}?",
    "What value does {key} have?",
)  # fmt: skip


class SheetSource:
    """Fact sheets; the names in them are taken from articles' titles and texts."""

    def __init__(self, data: ReaderData, cutter: Cutter, mixture: Mixture) -> None:
        self._cutter = cutter
        self._mixture = mixture
        self._articles = list(data.articles.values())

    def draft(self, shape: BatchShape, random: Random) -> Draft:
        if random.random() < self._mixture.key_value:
            return self._key_values(shape, random)
        return self._fact_sheets(shape, random)

    def _fact_sheets(self, shape: BatchShape, random: Random) -> Draft:
        things = random.randint(1, max(1, min(4, shape.passages)))
        titles = list(dict.fromkeys(self._name(random) for _ in range(things + 1)))
        hidden = titles.pop() if len(titles) > 1 else None
        kinds = random.sample(range(len(_NAMED) + len(_AMOUNTS) + len(_YEARS)), min(28, 6 + 4 * shape.passages))
        passages: list[Article] = []
        answered: list[tuple[str, str]] = []
        each = max(1, shape.passages // len(titles))
        for title in titles:
            facts = [self._fact(kind, title, random) for kind in random.sample(kinds, min(len(kinds), 7 * each))]
            for start in range(0, len(facts), max(1, -(-len(facts) // each))):
                part = facts[start : start + max(1, -(-len(facts) // each))]
                text = self._cutter.cut(Article(title, " ".join(fact[0] for fact in part)), shape.passage_tokens)
                passages.append(Article(title, text))
                answered += [(question, value) for statement, question, value in part if statement in text]
        random.shuffle(passages)
        random.shuffle(answered)
        texts = [passage.text for passage in passages[: shape.passages]]
        asked: list[tuple[str, str | None]] = []
        asked += [(question, value) for question, value in answered if any(value in text for text in texts)]
        if hidden and random.random() < self._mixture.refusal * shape.questions:
            asked.insert(0, (self._fact(random.choice(kinds), hidden, random)[1], None))
        return Draft(passages[: shape.passages], asked)

    def _fact(self, kind: int, title: str, random: Random) -> tuple[str, str, str]:
        """Statement, question and answer."""
        forms: tuple[str, ...]
        if kind < len(_NAMED):
            noun, value = _NAMED[kind], self._name(random)
            forms = _PERSON_ASKED if noun in _PEOPLE and random.random() < 0.8 else _ASKED
        elif kind < len(_NAMED) + len(_AMOUNTS):
            noun, unit = _AMOUNTS[kind - len(_NAMED)]
            number = random.choice((random.randrange(2, 1000), random.randrange(1000, 90_000_000)))
            value = (f"{number:,}" if random.random() < 0.8 else f"{number / 1000:.2f}") + unit
            forms = _AMOUNT_ASKED
            if noun == "population":
                forms = ("How many people live in {title}?", "How many inhabitants does {title} have?", *forms)
        else:
            verb, year = _YEARS[kind - len(_NAMED) - len(_AMOUNTS)], str(random.randrange(1200, 2025))
            statement = random.choice(("{title} was {verb} in {year}.", "It was {verb} in {year}."))
            question = random.choice(("When was {title} {verb}?", "In what year was {title} {verb}?"))
            return statement.format(title=title, verb=verb, year=year), question.format(title=title, verb=verb), year
        statement = random.choice(_STATED).format(noun=noun, title=title, value=value)
        return statement[0].upper() + statement[1:], random.choice(forms).format(noun=noun, title=title), value

    def _name(self, random: Random) -> str:
        article = random.choice(self._articles)
        if random.random() < 0.4 and len(article.title) < 40:
            return article.title
        names = [name for name in NAME.findall(article.text) if 3 < len(name) < 30]
        return random.choice(names) if names else article.title[:40]

    def _key_values(self, shape: BatchShape, random: Random) -> Draft:
        digits, pairs = random.choice(((4, 6), (6, 5), (8, 4), (12, 2), (32, 1)))
        draft = Draft()
        for number in range(shape.passages):
            title = random.choice(_KEY_PASSAGES).format(n=number + 1)
            lines = [(self._key(digits, random), self._key(digits, random)) for _ in range(pairs)]
            stated = " ".join(f'"{key}": "{value}".' for key, value in lines)
            text = self._cutter.cut(Article(title, stated), shape.passage_tokens)
            draft.passages.append(Article(title, text))
            held = [(key, value) for key, value in lines if f'"{key}": "{value}"' in text]
            draft.asked += [(random.choice(_KEY_ASKED).format(key=key), value) for key, value in held]
        random.shuffle(draft.asked)
        return draft

    @staticmethod
    def _key(digits: int, random: Random) -> str:
        key = "".join(random.choice("0123456789abcdef") for _ in range(digits))
        return key if digits < 32 else "-".join((key[:8], key[8:12], key[12:16], key[16:20], key[20:]))
