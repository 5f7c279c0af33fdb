"""Text → passages that fit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from blockrag.ingest import splitting
from blockrag.ingest.splitting import BlockCounter, PassageSplitter
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.template import PromptTemplate
from tests.models import make_tiny_bundle
from tests.unit.ingest.tokenizers import TEMPLATE, WordTokenizer

SAMPLES = ["\n\n", ". ", " word" * 9, "x" * 70, "<|text|>", "日本語。", "# H\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The tiny bundle's byte-level tokenizer."""
    directory: Path = tmp_path_factory.mktemp("bundle") / "tiny"
    return load_bundle(make_tiny_bundle(directory)).load_tokenizer()


def split(splitter: PassageSplitter, title: str, *pieces: str, markdown: bool = False) -> list[str]:
    return list(splitter.split(splitter.fit_title(title), pieces, markdown=markdown))


def words_splitter(tokens: int = 16) -> PassageSplitter:
    return PassageSplitter(TEMPLATE, WordTokenizer(), tokens)


def solid(text: str) -> str:
    return "".join(text.split())


def test_passages_end_with_sentences_and_hold_what_fits() -> None:
    text = "One two three four five. Six seven eight nine ten. Eleven twelve thirteen fourteen. Fifteen."

    # Two tokens of the template and one of the title leave 13.
    assert split(words_splitter(), "Title", text) == [
        "One two three four five. Six seven eight nine ten.",
        "Eleven twelve thirteen fourteen. Fifteen.",
    ]


def test_paragraphs_go_before_sentences() -> None:
    text = "One two three four five six.\n\nSeven eight nine ten. Eleven twelve thirteen fourteen. Fifteen sixteen."

    assert split(words_splitter(), "Title", text) == [
        "One two three four five six.",
        "Seven eight nine ten. Eleven twelve thirteen fourteen. Fifteen sixteen.",
    ]


def test_a_sentence_that_is_too_long_is_split_at_words() -> None:
    passages = split(words_splitter(), "Title", " ".join(f"word{number}" for number in range(40)))

    assert [len(passage.split()) for passage in passages] == [13, 13, 13, 1]


def test_markdown_keeps_its_sections_together() -> None:
    text = "# One\n\nalpha beta gamma delta.\n\n# Two\n\n- first point\n- second point\n"

    assert split(words_splitter(), "Title", text, markdown=True) == [
        "# One\n\nalpha beta gamma delta.",
        "# Two\n\n- first point\n- second point",
    ]


@pytest.mark.parametrize("markdown", [False, True])
def test_a_heading_is_not_alone(markdown: bool) -> None:
    text = "# The Heading\n\n" + "Here is a sentence of eight words only. " * 3

    assert split(words_splitter(), "Title", text, markdown=markdown) == [
        "# The Heading\n\nHere is a sentence of eight words only.",
        "Here is a sentence of eight words only.",
        "Here is a sentence of eight words only.",
    ]


def test_no_text_gives_no_passage() -> None:
    assert split(words_splitter(), "Title", "", " \n\n ") == []


@pytest.mark.parametrize("markdown", [False, True])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    title=st.text(max_size=60),
    text=st.lists(
        st.one_of(st.text(max_size=30), st.sampled_from(SAMPLES)),
        max_size=25,
    ).map("".join),
    tokens=st.integers(16, 60),
    piece=st.integers(1, 300),
)
@example(title="", text="a <|passage|> b <|end|>" * 9, tokens=16, piece=300)
@example(title="", text="\x1f", tokens=16, piece=1)
@example(title="t" * 60, text="👩‍👩‍👧‍👦" * 20, tokens=16, piece=1)
def test_everything_is_in_one_passage_and_every_block_fits(
    tokenizer: PreTrainedTokenizerFast, markdown: bool, title: str, text: str, tokens: int, piece: int
) -> None:
    splitter = PassageSplitter(TEMPLATE, tokenizer, tokens)
    fitted = splitter.fit_title(title)
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    passages = list(splitter.split(fitted, pieces, markdown=markdown))

    assert solid("".join(passages)) == solid(text)
    assert all(passage.strip() for passage in passages)
    for passage in passages:
        assert len(TEMPLATE.passage_ids(tokenizer, fitted.text, passage)) <= tokens


@pytest.mark.parametrize("markdown", [False, True])
def test_windows_leave_no_mark(monkeypatch: pytest.MonkeyPatch, markdown: bool) -> None:
    text = "".join(f"Sentence {number} has some words. " + "\n\n" * (number % 7 == 0) for number in range(3000))
    whole = split(words_splitter(40), "Title", text, markdown=markdown)
    monkeypatch.setattr(splitting, "WINDOW_CHARS", 1000)
    pieces = [text[start : start + 333] for start in range(0, len(text), 333)]

    assert split(words_splitter(40), "Title", *pieces, markdown=markdown) == whole


@pytest.mark.parametrize("markdown", [False, True])
def test_white_space_takes_no_longer_than_text(markdown: bool) -> None:
    """It was split again from its beginning with every piece: 6 MiB took half a minute."""
    started = time.process_time()
    pieces = ["word", *[" " * 65_536] * 96, "\n\nThe end.", *[" \n" * 32_768] * 32]
    assert split(words_splitter(), "Title", *pieces, markdown=markdown) == ["word", "The end."]
    assert time.process_time() - started < 5


def test_a_long_title_is_cut_and_said_to_be() -> None:
    splitter = words_splitter(20)
    short, long = splitter.fit_title("a short title"), splitter.fit_title("so many words " * 20)

    assert (short.text, short.text_tokens) == ("a short title", 15)
    assert long.text == "so many words so many words so many…"
    assert long.text_tokens == 10


def test_a_long_word_as_a_title_is_cut_within(tokenizer: PreTrainedTokenizerFast) -> None:
    fitted = PassageSplitter(TEMPLATE, tokenizer, 32).fit_title("x" * 500)

    assert set(fitted.text) == {"x", "…"}
    assert 16 <= fitted.text_tokens < 32


def test_the_fingerprint_tells_settings_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    other = PromptTemplate("<|begin|>", "<|passage|>{title}: {text}", "{question}", "", "<|end|>", "no")
    fingerprints = [
        PassageSplitter(TEMPLATE, tokenizer, 64).fingerprint,
        PassageSplitter(TEMPLATE, tokenizer, 65).fingerprint,
        PassageSplitter(other, tokenizer, 64).fingerprint,
        PassageSplitter(TEMPLATE, WordTokenizer(), 64).fingerprint,
    ]

    assert PassageSplitter(TEMPLATE, tokenizer, 64).fingerprint == fingerprints[0]
    assert len(set(fingerprints)) == 4


@given(title=st.text(max_size=20), text=st.text(max_size=80))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize(
    "pattern", [TEMPLATE.passage, "<|passage|>{title}: {text}", "{text} ({title})", "<|text|>  {text}<|end|>"]
)
def test_counts_are_those_of_the_template(
    tokenizer: PreTrainedTokenizerFast, pattern: str, title: str, text: str
) -> None:
    template = PromptTemplate("", pattern, "{question}", "", "<|end|>", "no")
    counter = BlockCounter(template, tokenizer)

    assert counter.overhead(title) + counter.text_count(text) == len(template.passage_ids(tokenizer, title, text))
