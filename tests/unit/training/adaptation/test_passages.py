import pytest

from blockrag.training.adaptation.samples import cut_passage, sentences
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer

TEXT = "Doha is a city (1998). Its official language is Arabic. It has a population of 956,460 and a port."


def test_sentences_end_at_periods_not_at_initials() -> None:
    assert sentences("Written by J. R. Smith. It sold 3.5 million.") == [
        "Written by J. R. Smith.",
        "It sold 3.5 million.",
    ]
    assert sentences("") == []


@pytest.mark.parametrize("limit", [12, 30, 45, 60, 200])
def test_a_cut_passage_fits_and_begins_the_text(limit: int) -> None:
    tokenizer = make_tiny_tokenizer()
    cut = cut_passage(tokenizer, TEST_TEMPLATE, "Doha", TEXT, limit)
    assert TEXT.startswith(cut)
    assert len(TEST_TEMPLATE.passage_ids(tokenizer, "Doha", cut)) <= limit
    if limit == 200:
        assert cut == TEXT
