from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from blockrag.errors import SetupError
from blockrag.evaluation.drawing import PieceMaker
from blockrag.training.adaptation.contexts import Context, ContextSource, Excluded, Pool, load_pools
from blockrag.training.adaptation.samples import SampleLimits
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer
from tests.unit.evaluation.question_files import write_patterns
from tests.unit.training.adaptation.conftest import write_rows

TOKENIZER = make_tiny_tokenizer()
LIMITS = SampleLimits(min_passages=1, max_passages=6, passage_tokens=96, max_tokens=2000, refusal_share=0.25)
METALS = ("zinc", "iron", "lead", "gold", "brass", "steel", "tin", "copper")


def house_rows(houses: int = 8) -> list[dict[str, object]]:
    """Three questions about each house, whose passage says what its doors are made of."""
    rows = []
    for house in range(houses):
        metals = [METALS[(house + door) % len(METALS)] + str(house) for door in range(3)]
        text = " ".join(f"Door {door} of house {house} is {metal}." for door, metal in enumerate(metals))
        passage = {"title": f"House {house}", "text": text, "gold": True}
        rows += [
            {"question": f"What is door {door} of house {house} made of?", "answers": [metal], "passages": [passage]}
            for door, metal in enumerate(metals)
        ]
    return rows


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return load_pools([write_rows(tmp_path / "houses.jsonl", house_rows())], pieces(), [])[0]


def pieces() -> PieceMaker:
    return PieceMaker(TEST_TEMPLATE, TOKENIZER, 96)


def source(pool: Pool, limits: SampleLimits = LIMITS, questions: int = 8, seed: int = 0) -> ContextSource:
    return ContextSource([(pool, 1.0)], TOKENIZER, TEST_TEMPLATE, limits, questions, seed)


def asked(context: Context) -> list[tuple[str, str]]:
    """Question and answer of each branch, as text."""
    found = []
    for prompt, answer in context.branches:
        question = TOKENIZER.decode(prompt).removeprefix("<|question|> ").removesuffix("<|answer|>")
        found.append((question.lower().rstrip("?"), TOKENIZER.decode(answer).removesuffix("<|end|>").strip()))
    return found


def test_a_context_is_a_function_of_seed_and_number_alone(pool: Pool) -> None:
    ahead = [source(pool).sample(number) for number in (40, 3, 17)]

    drawn = source(pool)
    assert [drawn.sample(number) for number in (40, 3, 17)] == ahead
    assert source(pool, seed=1).sample(3) != ahead[1]


def test_every_question_is_answered_by_what_is_shown_or_refused(pool: Pool) -> None:
    answers = {str(row["question"]).lower().rstrip("?"): row["answers"][0] for row in house_rows()}  # type: ignore[index]
    drawn = source(pool)
    refused = given = 0
    for number in range(80):
        context = drawn.sample(number)
        shown = " ".join(TOKENIZER.decode(block) for block in context.blocks)
        questions = asked(context)
        assert len({question for question, _ in questions}) == len(questions) <= 8
        for question, answer in questions:
            if answer == TEST_TEMPLATE.refusal:
                refused += 1
                assert answers[question] not in shown
            else:
                given += 1
                assert answer == answers[question] and answer in shown
    assert refused / (refused + given) == pytest.approx(LIMITS.refusal_share, abs=0.08)
    assert given > 160, "one pass over the passages should serve several questions"


def test_without_refusals_the_lead_is_always_answered(pool: Pool) -> None:
    drawn = source(pool, replace(LIMITS, refusal_share=0.0, max_passages=1))

    for number in range(20):
        context = drawn.sample(number)
        assert len(context.blocks) == 2, "the instruction and the gold passage"
        assert all(answer != TEST_TEMPLATE.refusal for _, answer in asked(context))


def test_a_context_stays_within_its_tokens(pool: Pool) -> None:
    drawn = source(pool, replace(LIMITS, max_tokens=300))

    assert max(drawn.sample(number).tokens for number in range(40)) <= 300


def test_a_question_that_its_own_passage_does_not_answer_is_refused_beside_it(tmp_path: Path) -> None:
    passage = {"title": "House", "text": "The door of the house is zinc.", "gold": True}
    rows = [{"question": "What is the roof made of?", "answers": [], "passages": [passage]}] * 2
    rows.append({"question": "What is the door made of?", "answers": ["zinc"], "passages": [passage]})
    pool = load_pools([write_rows(tmp_path / "house.jsonl", rows)], pieces(), [])[0]

    found = {pair for number in range(30) for pair in asked(source(pool, LIMITS).sample(number))}

    assert ("what is the roof made of", TEST_TEMPLATE.refusal) in found
    assert ("what is the door made of", "zinc") in found


def test_distractors_of_pattern_questions_are_of_the_same_kind(tmp_path: Path) -> None:
    folder = write_patterns(tmp_path / "data")
    pool = load_pools([folder / "dev" / "wiki_pattern_qa.jsonl.gz"], pieces(), [])[0]
    question = next(question for question in pool.questions if question.same_kind)

    near = pool.near(question, Random(0))

    assert near and set(near) <= {*question.same_kind, *(n for n in near if pool.asked_of(n))}
    assert not set(near) & set(question.gold)


def test_what_is_evaluated_on_is_left_out(tmp_path: Path) -> None:
    rows = house_rows()
    data = write_rows(tmp_path / "houses.jsonl", rows)
    held_out = write_rows(tmp_path / "dev.jsonl", [row for row in rows if "house 3" in str(row["question"])])

    pool = load_pools([data], pieces(), [held_out])[0]

    assert len(pool.questions) == len(rows) - 3
    assert not any("house 3" in question.text for question in pool.questions)
    with pytest.raises(SetupError, match="houses: no question"):
        load_pools([data], pieces(), [data])


def test_intros_of_one_kind_may_share_words_with_those_evaluated_on(tmp_path: Path) -> None:
    folder = write_patterns(tmp_path / "data")
    file = folder / "dev" / "wiki_pattern_qa.jsonl.gz"
    texts = {p.gold[0]: p for p in load_pools([file], pieces(), [])[0].questions}
    excluded = Excluded([file])

    assert texts
    assert excluded("some text of another article") is False
