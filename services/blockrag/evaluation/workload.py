"""Contexts of given sizes for measurements, cut from the sample corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from blockrag.corpus.sample import load_articles
from blockrag.errors import SettingsError
from blockrag.evaluation.ttft_grpc import Workload
from blockrag.results import GivenPassage

if TYPE_CHECKING:
    from blockrag.modeling.bundle import Bundle

QUESTION = (
    "Considering all of the countries that are described in the passages above, and leaving aside those for which "
    "no figure is given at all, what is the name of the capital of the country that has the largest population, "
    "and when did it become independent?"
)
"""About 50 tokens with the bundled reader's vocabulary."""


def make_workload(bundle: Bundle, contexts: Sequence[int]) -> Workload:
    """Passages of the bundle's size for each number of tokens, and as many others to displace them.

    No passage stands in two contexts. Raises ``SettingsError`` when the sample corpus is too small for them.
    """
    passages = _passages(bundle)
    sized = {tokens: _take(passages, tokens) for tokens in contexts}
    return Workload(QUESTION, sized, _take(passages, max(contexts)))


def first_passages(bundle: Bundle, count: int) -> tuple[GivenPassage, ...]:
    """The sample corpus's first ``count`` passages that fill the bundle's passages to three quarters at least."""
    full = (passage for passage, tokens in _passages(bundle) if 4 * tokens >= 3 * bundle.passage_tokens)
    found = tuple(islice(full, count))
    if len(found) < count:
        raise SettingsError(f"the sample corpus has only {len(found)} passages of that size")
    return found


def _take(passages: Iterator[tuple[GivenPassage, int]], tokens: int) -> tuple[GivenPassage, ...]:
    taken: list[GivenPassage] = []
    left = tokens
    while left > 0:
        found = next(passages, None)
        if found is None:
            raise SettingsError("the sample corpus has too few passages for contexts of these sizes")
        taken.append(found[0])
        left -= found[1]
    return tuple(taken)


def _passages(bundle: Bundle) -> Iterator[tuple[GivenPassage, int]]:
    """The almanac's passages with the tokens of their blocks."""
    from blockrag.ingest import PassageSplitter

    tokenizer = bundle.load_tokenizer()
    splitter = PassageSplitter(bundle.template, tokenizer, bundle.passage_tokens)
    for article in load_articles():
        title = splitter.fit_title(article.title)
        for text in splitter.split(title, [article.text], markdown=True):
            yield GivenPassage(text, title.text), len(bundle.template.passage_ids(tokenizer, title.text, text))
