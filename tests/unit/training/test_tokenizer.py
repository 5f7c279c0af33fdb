from pathlib import Path

import pytest
from transformers import AutoTokenizer

from blockrag.modeling.template import READER_TEMPLATE
from blockrag.training.data import load_reader_data
from blockrag.training.tokenizer import (
    BEGIN_ID,
    END_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    TemplateTokenizer,
    load_template_tokenizer,
    save_tokenizer,
    tokenizer_texts,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    learnt = train_tokenizer(tokenizer_texts(load_reader_data(data_dir), 100), 400)
    save_tokenizer(learnt, folder, 512)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TemplateTokenizer:
    return load_template_tokenizer(folder)


@pytest.mark.parametrize("text", ["Its population is 4,711.", "naïve Ångström 東京 🙂", "  two  spaces\nline", ""])
def test_round_trip(tokenizer: TemplateTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer: TemplateTokenizer) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer("in 1998, 20045 people")["input_ids"]]
    assert all(len(piece.strip()) == 1 for piece in pieces if any(character.isdigit() for character in piece))


def test_special_tokens_have_their_ids(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(16))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (PAD_ID, BEGIN_ID, END_ID)
    assert loaded.model_max_length == 512


def test_the_fast_path_gives_the_ids_of_transformers(folder: Path, tokenizer: TemplateTokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    title, text = "Doha <|end|>", "Doha has 956,460 people (1998). <|question|> none"
    assert READER_TEMPLATE.passage_ids(loaded, title, text) == READER_TEMPLATE.passage_ids(tokenizer, title, text)
    assert READER_TEMPLATE.final_ids(loaded, "When?") == READER_TEMPLATE.final_ids(tokenizer, "When?")
    assert READER_TEMPLATE.answer_ids(loaded, "19 May") == READER_TEMPLATE.answer_ids(tokenizer, "19 May")
    assert END_ID not in READER_TEMPLATE.passage_ids(tokenizer, title, text)
