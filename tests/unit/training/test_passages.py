from pathlib import Path
from random import Random

import pytest

from blockrag.modeling.template import READER_TEMPLATE
from blockrag.training.attributes import attribute_questions
from blockrag.training.data import load_reader_data
from blockrag.training.passages import cut_passage, sentences
from blockrag.training.tokenizer import TemplateTokenizer, tokenizer_texts, train_tokenizer

TEXT = "Doha is a city (1998). Its official language is Arabic. It has a population of 956,460 and a port."


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> TemplateTokenizer:
    return TemplateTokenizer(train_tokenizer(tokenizer_texts(load_reader_data(data_dir), 100), 400))


def test_sentences_end_at_periods_not_at_initials() -> None:
    assert sentences("Written by J. R. Smith. It sold 3.5 million.") == [
        "Written by J. R. Smith.",
        "It sold 3.5 million.",
    ]
    assert sentences("") == []


@pytest.mark.parametrize("limit", [12, 30, 45, 60, 200])
def test_a_cut_passage_fits_and_begins_the_text(tokenizer: TemplateTokenizer, limit: int) -> None:
    cut = cut_passage(tokenizer, READER_TEMPLATE, "Doha", TEXT, limit)
    assert TEXT.startswith(cut)
    assert len(READER_TEMPLATE.passage_ids(tokenizer, "Doha", cut)) <= limit
    if limit == 200:
        assert cut == TEXT


def test_attributes_are_asked_with_the_sentence_s_own_noun() -> None:
    found = {question.answers[0]: question.text for question in attribute_questions("Doha", TEXT, Random(0))}
    assert set(found) == {"Arabic", "956,460"}
    assert "official language" in found["Arabic"]
    assert "population" in found["956,460"]
