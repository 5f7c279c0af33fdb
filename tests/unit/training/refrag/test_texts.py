from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random

import pytest

from blockrag.errors import SetupError
from blockrag.training.refrag.texts import PassageSource, Text, hold_out, read_texts, text_start
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer


def test_both_forms_of_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.write(json.dumps({"title": "shelf/A book", "paragraphs": ["One  two.", " ", "Three."]}) + "\n\n")
        out.write(json.dumps({"text": "Four.\n\nFive."}) + "\n")
    assert read_texts([path]) == [Text("A book", ("One two.", "Three.")), Text("", ("Four. Five.",))]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ('{"title": 3, "text": "x"}', "title must be a text"),
        ('{"title": "x"}', "needs text"),
        ('{"paragraphs": ["x", 3]}', "needs text"),
        ('{"text": " "}', "is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(SetupError, match=rf"texts\.jsonl:2: .*{problem}"):
        read_texts([path])


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(SetupError, match=r"empty\.jsonl: no texts"):
        read_texts([tmp_path / "empty.jsonl"])
    with pytest.raises(SetupError, match="absent"):
        read_texts([tmp_path / "absent"])


def test_texts_are_held_out_by_their_content() -> None:
    texts = [Text(f"t{number}", (f"paragraph {number}",)) for number in range(400)]
    train, held = hold_out(texts)
    assert 2 <= len(held) <= 20
    assert sorted(text.title for text in train + held) == sorted(text.title for text in texts)
    assert set(hold_out(texts[::-1])[1]) == set(held)
    assert len(hold_out(texts[:2])[1]) == 1
    with pytest.raises(SetupError, match="at least two"):
        hold_out(texts[:1])


def test_passages_follow_each_other_and_keep_their_size() -> None:
    tokenizer = make_tiny_tokenizer()
    paragraphs = tuple(f"This is sentence {n}. It has number {n} too." for n in range(30))
    source = PassageSource([Text("A", paragraphs)], tokenizer, TEST_TEMPLATE, 64)
    passages = source.draw(4, Random(1), least=2)
    assert all(len(passage) <= 64 for passage in passages)
    texts = [tokenizer.decode(passage).split("<|text|>")[1].strip() for passage in passages]
    assert " ".join(texts) in " ".join(paragraphs)
    start = text_start(passages[0], passages[1:])
    assert tokenizer.decode(passages[0][:start]).startswith("<|passage|> A<|text|>")


def test_passages_of_a_text_in_one_paragraph_come_from_all_over_it() -> None:
    tokenizer = make_tiny_tokenizer()
    whole = " ".join(f"This is sentence {n}. It has number {n} too." for n in range(4000))
    source = PassageSource([Text("A", (whole,))], tokenizer, TEST_TEMPLATE, 64)
    random = Random(2)
    places = []
    for _ in range(40):
        passages = source.draw(4, random, least=4)
        texts = [tokenizer.decode(passage).split("<|text|>")[1].strip() for passage in passages]
        joined = " ".join(texts)
        assert joined in whole and len(passages) == 4
        assert whole.index(joined) == 0 or whole[whole.index(joined) - 2] == ".", "begins with a sentence"
        places.append(whole.index(joined) / len(whole))
    assert len(set(places)) > 35
    assert min(places) < 0.15 and max(places) > 0.85


def test_texts_too_short_for_the_wanted_passages_are_an_error() -> None:
    source = PassageSource([Text("A", ("Short.",))], make_tiny_tokenizer(), TEST_TEMPLATE, 64)
    with pytest.raises(SetupError, match="fewer than 2 passages"):
        source.draw(3, Random(0), least=2)
