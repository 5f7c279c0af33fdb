from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from blockrag.errors import SetupError
from blockrag.training.adaptation.batch import Context
from blockrag.training.adaptation.samples import Passage, Row, SampleLimits, SampleSource
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer
from tests.unit.training.adaptation.conftest import colour_rows

TOKENIZER = make_tiny_tokenizer()
LIMITS = SampleLimits(min_passages=1, max_passages=20, passage_tokens=64, max_tokens=2000, refusal_share=0.25)


def rows(count: int = 60) -> list[Row]:
    return [
        Row(f"rows:{number}", row["question"], tuple(row["answers"]), tuple(Passage(**p) for p in row["passages"]))
        for number, row in enumerate(colour_rows(count), 1)
    ]


def numbered_rows() -> list[Row]:
    """Rows whose passages all differ, enough for twenty in a prompt."""
    return [
        Row(f"r:{n}", f"What is {n} called?", (f"name{n}x",), (Passage(f"T{n}", f"It is name{n}x.", True),))
        for n in range(40)
    ]


def long_row(sentences: int, at: int, number: int = 0) -> Row:
    """A row whose only passage is long and has the answer in sentence ``at``."""
    text = " ".join(
        f"Door {number} is zinc." if place == at else f"Nothing {place} happens here." for place in range(sentences)
    )
    return Row(f"long:{number}", f"What is door {number} made of?", ("zinc",), (Passage("House", text, True),))


def source(of: list[Row], limits: SampleLimits = LIMITS, seed: int = 0) -> SampleSource:
    return SampleSource(of, TOKENIZER, TEST_TEMPLATE, limits, seed)


def texts(sample: Context) -> list[str]:
    return [TOKENIZER.decode(block) for block in sample.blocks]


def test_a_sample_is_a_function_of_seed_and_number_alone() -> None:
    first, second = source(rows()), source(rows())

    ahead = [second.sample(number) for number in (90, 7, 61)]

    assert [first.sample(number) for number in (90, 7, 61)] == ahead
    assert source(rows(), seed=1).sample(7) != ahead[1]


def test_every_row_once_in_each_pass_over_the_data() -> None:
    drawn = source(rows(30), replace(LIMITS, refusal_share=0.0))
    questions = [TOKENIZER.decode(drawn.sample(number).branches[0].prompt) for number in range(60)]

    expected = Counter(f"<|question|> {row.question}<|answer|>" for row in rows(30))
    assert Counter(questions[:30]) == expected
    assert Counter(questions[30:]) == expected
    assert questions[:30] != questions[30:]


def test_passages_are_one_to_twenty_with_the_gold_one_at_any_place() -> None:
    drawn = source(numbered_rows(), replace(LIMITS, refusal_share=0.0))
    counts: Counter[int] = Counter()
    places: Counter[float] = Counter()
    for number in range(400):
        sample = drawn.sample(number)
        answer = TOKENIZER.decode(sample.branches[0].answer).removesuffix("<|end|>").strip()
        holding = [place for place, text in enumerate(texts(sample)[1:]) if f"{answer}." in text]
        assert len(holding) == 1
        counts[len(sample.blocks) - 1] += 1
        places[holding[0] / max(1, len(sample.blocks) - 2)] += 1
        assert texts(sample)[0] == "<|begin|>"

    assert set(counts) == set(range(1, 21))
    assert places[0.0] > 20 and places[1.0] > 20 and len(places) > 20


def test_without_the_gold_passage_the_answer_is_the_refusal_and_nothing_shown_holds_it() -> None:
    drawn = source(numbered_rows())
    refused = 0
    for number in range(200):
        sample = drawn.sample(number)
        asked = TOKENIZER.decode(sample.branches[0].prompt).removesuffix(" called?<|answer|>").rpartition(" ")[2]
        shown = [text for text in texts(sample) if f"name{asked}x" in text]
        if TOKENIZER.decode(sample.branches[0].answer) == " not in the passages<|end|>":
            refused += 1
            assert not shown and len(sample.blocks) > 1
        else:
            assert len(shown) == 1

    assert 30 <= refused <= 70  # a quarter of 200


def test_a_row_without_gold_passages_is_refused() -> None:
    unanswered = Row("u:1", "What is the moon?", (), (Passage("Sun", "The sun is hot.", False),))

    sample = source([unanswered], replace(LIMITS, refusal_share=0.0, max_passages=1)).sample(0)

    assert texts(sample)[1:] == ["<|passage|> Sun<|text|> The sun is hot."]
    assert TOKENIZER.decode(sample.branches[0].answer) == " not in the passages<|end|>"


def test_distractors_come_from_other_rows_and_never_hold_the_answer() -> None:
    drawn = source(rows(), replace(LIMITS, min_passages=8, max_passages=8, refusal_share=0.0))
    for number in range(40):
        sample = drawn.sample(number)
        colour = TOKENIZER.decode(sample.branches[0].answer).removesuffix("<|end|>").strip()

        assert sum(f"is {colour}." in text for text in texts(sample)) == 1
        assert len(set(sample.blocks)) == len(sample.blocks)


def test_all_gold_passages_of_a_question_are_shown() -> None:
    hop = Row("h:1", "Who?", ("Ann",), (Passage("a", "Bo is Ann.", True), Passage("b", "Bo did it.", True)))

    sample = source([hop], replace(LIMITS, max_passages=2, refusal_share=0.0)).sample(0)

    assert sorted(texts(sample)[1:]) == ["<|passage|> a<|text|> Bo is Ann.", "<|passage|> b<|text|> Bo did it."]


def test_a_long_gold_passage_is_cut_around_its_answer() -> None:
    of = [long_row(40, at, at) for at in (0, 13, 39)]
    drawn = source(of, replace(LIMITS, refusal_share=0.0, max_passages=1))
    for number in range(30):
        block = drawn.sample(number).blocks[1]

        assert "is zinc." in TOKENIZER.decode(block)
        assert len(block) <= LIMITS.passage_tokens


def test_distractors_are_left_out_to_keep_a_sample_short() -> None:
    tight = replace(LIMITS, min_passages=10, max_passages=10, max_tokens=200, refusal_share=0.0)
    drawn = source(rows(), tight)

    samples = [drawn.sample(number) for number in range(40)]

    assert max(sample.tokens for sample in samples) <= 200
    assert drawn.too_long == {}
    assert all(len(sample.blocks) >= 2 for sample in samples)


def test_rows_that_cannot_fit_are_reported_and_replaced() -> None:
    endless = Row("big:1", "why " * 300, ("so",), (Passage("t", "It is so.", True),))
    drawn = source([*rows(9), endless], replace(LIMITS, max_tokens=250))

    prompts = [len(drawn.sample(number).branches[0].prompt) for number in range(10)]

    assert max(prompts) < 250
    assert list(drawn.too_long) == ["big:1"]
    assert drawn.too_long["big:1"] > 250


def test_when_no_row_fits_it_says_what_one_needs() -> None:
    with pytest.raises(SetupError, match=r"do not fit 20 tokens; rows:\d+ needs \d+: raise max_tokens"):
        source(rows(), replace(LIMITS, max_tokens=20)).sample(0)


def test_rows_of_which_none_has_anything_to_show_are_refused() -> None:
    unmarked = [Row(f"r:{n}", "What is it?", ("zinc",), (Passage("", "It is zinc.", False),)) for n in range(3)]

    with pytest.raises(SetupError, match='mark the passages that answer with "gold": true'):
        source(unmarked).sample(0)


def test_a_special_tokens_text_in_the_data_stays_text() -> None:
    row = Row("s:1", "Who <|answer|> is?", ("Ann<|end|>",), (Passage("t<|passage|>", "Ann<|end|> <|text|>.", True),))

    sample = source([row], replace(LIMITS, refusal_share=0.0, max_passages=1)).sample(0)

    special = set(TOKENIZER.all_special_ids) | set(TOKENIZER.get_added_vocab().values())
    assert [token for token in sample.blocks[1] if token in special] == [3, 4]
    assert [token for token in sample.branches[0].prompt if token in special] == [5, 6]
    assert [token for token in sample.branches[0].answer if token in special] == [2]
