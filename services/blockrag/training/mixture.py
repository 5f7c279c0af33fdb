"""What training contexts are made of, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from blockrag.training.drafts import BatchShape


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of contexts and of what is asked in them."""

    articles: float = 0.26
    """Share of contexts made of article intros with pattern questions."""
    people: float = 0.34
    """Share of contexts made of paragraphs that people asked about."""
    texts: float = 0.32
    """Share of contexts made of neighbouring passages of one long text."""
    sheets: float = 0.08
    """Share of contexts made up from random facts and keys."""
    same_kind: float = 0.65
    """Share of contexts of intros whose articles stand in one table."""
    refusal: float = 0.09
    """Share of pattern and made-up questions whose passage is left out of the context; the answer is the template's
    refusal."""
    people_refusal: float = 0.015
    """The same share of people's questions. A reader this small is seldom sure of an answer to them, and with 8 % of
    them refused in training, refusing was its likeliest answer to nearly all."""
    cloze: float = 1.6
    """Questions made from a passage's own sentences, per passage on the average."""
    reworded: float = 0.65
    """Share of these that are asked in other words than the sentence's; the others leave a span of it out."""
    key_value: float = 0.25
    """Share of made-up contexts that are keys and values."""
    paraphrase: float = 0.35
    """Chance of a pattern question to be asked in other words."""
    plain_case: float = 0.12
    """Share of questions written in lower case, half of them without the question mark."""
    is_a: float = 0.7
    """Chance of keeping a "what is ..." question, which are half of all pattern questions."""
    spread: float = 0.25
    """Share of contexts whose blocks stand at positions with gaps between them, up to ``spread_tokens``: far positions
    are learnt without paying for the tokens in between (PoSE, arXiv 2309.10400, section 3)."""
    spread_tokens: int = 3072
    opening: float = 0.12
    """Part of the training that uses small contexts: they teach copying from a passage sooner."""
    long_from: float = 0.45
    """Part of the training after which contexts have up to ten passages of up to 128 tokens, one in twelve twenty.
    Long contexts hold fewer questions per token, so they come when copying is learnt."""


def batch_shape(random: Random, progress: float, mixture: Mixture) -> BatchShape:
    """Draw the shape of a batch at ``progress`` (0 to 1) of the training."""
    if progress < mixture.opening:
        return BatchShape(random.choice((2, 3, 4)), 72)
    if progress < mixture.long_from:
        return BatchShape(random.choices((1, 2, 3, 4, 5, 6), (1, 2, 3, 10, 2, 1))[0], random.choice((72, 72, 96)))
    counts = (*range(1, 11), 20)
    passages = random.choices(counts, (1, 1, 2, 4, 7, 2, 2, 2, 2, 4, 2.5))[0]
    return BatchShape(passages, random.choice((72, 96, 128, 128)))
