from pathlib import Path
from random import Random

import pytest

from blockrag.modeling.template import READER_TEMPLATE
from blockrag.training.contexts import ContextSampler
from blockrag.training.data import dev_urls, load_reader_data, read_articles
from blockrag.training.drafts import BatchShape
from blockrag.training.mixture import Mixture, batch_shape
from blockrag.training.tokenizer import TemplateTokenizer, tokenizer_texts, train_tokenizer

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> TemplateTokenizer:
    return TemplateTokenizer(train_tokenizer(tokenizer_texts(load_reader_data(data_dir), 100), 400))


def _sampler(data_dir: Path, tokenizer: TemplateTokenizer, mixture: Mixture) -> ContextSampler:
    return ContextSampler(load_reader_data(data_dir), tokenizer, READER_TEMPLATE, mixture)


def test_no_dev_article_is_trained_on(data_dir: Path) -> None:
    data = load_reader_data(data_dir)
    asked = dev_urls(data_dir)
    texts = {read_articles(data_dir)[url].text for url in asked}
    assert not asked & set(data.articles)
    assert not texts & {article.text for article in data.articles.values()}, "nor under another url"
    assert set(data.questions) <= set(data.articles)
    assert not any(asked & set(urls) for urls in data.tables.values())
    assert not {article.text for article, _ in data.held_out} & {article.text for article in data.articles.values()}


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real training data is not beside this checkout")
def test_no_dev_article_is_trained_on_in_the_real_data() -> None:
    data = load_reader_data(SHARED_DATA)
    asked = dev_urls(SHARED_DATA)
    assert len(asked) > 10_000
    assert not asked & set(data.articles)
    assert not any(asked & set(urls) for urls in data.tables.values())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wiki_intros"):
        load_reader_data(tmp_path)


def test_no_dev_passage_is_trained_on(data_dir: Path) -> None:
    data = load_reader_data(data_dir)
    texts = [paragraph.article.text for found in data.people.values() for paragraph in found]
    texts += [article.text for article in data.articles.values()]
    texts += [part for found in data.documents.values() for document in found for part in document.paragraphs]
    assert len(texts) > 20
    assert not any("evaluated here" in text for text in texts)


@pytest.mark.parametrize("kind", ["articles", "people", "texts", "sheets"])
def test_contexts_show_the_answer_or_refuse(data_dir: Path, tokenizer: TemplateTokenizer, kind: str) -> None:
    shares = {name: float(name == kind) for name in ("articles", "people", "texts", "sheets")}
    sampler = _sampler(data_dir, tokenizer, Mixture(**shares, people_refusal=0.08))
    refusal = READER_TEMPLATE.answer_ids(tokenizer, READER_TEMPLATE.refusal)
    refused = answered = 0
    for seed in range(80):
        context = sampler.sample(BatchShape(4, 96), Random(seed))
        shown = [tokenizer.decode(block) for block in context.blocks]
        assert 1 <= len(context.branches) <= BatchShape(4, 96).questions
        assert 2 <= len(shown) <= 5
        assert all(len(block) <= 96 for block in context.blocks)
        for branch in context.branches:
            if branch.answer == refusal:
                refused += 1
            else:
                answered += 1
                assert any(tokenizer.decode(branch.answer[:-1]).strip() in passage for passage in shown)
    assert answered > 80
    assert (refused > 0) == (kind != "texts")
    assert refused < 0.5 * answered


def test_a_refused_article_is_not_shown(data_dir: Path, tokenizer: TemplateTokenizer) -> None:
    sampler = _sampler(data_dir, tokenizer, Mixture(people=0, texts=0, sheets=0, refusal=0.2, paraphrase=0))
    refusal = READER_TEMPLATE.answer_ids(tokenizer, READER_TEMPLATE.refusal)
    seen = 0
    for seed in range(100):
        context = sampler.sample(BatchShape(4, 96), Random(seed))
        shown = [tokenizer.decode(block) for block in context.blocks]
        for branch in context.branches:
            if branch.answer == refusal:
                seen += 1
                name = tokenizer.decode(branch.prompt).split(" of ")[1].split("?")[0].split("<")[0]
                assert not any(f" {name}<|text|>".lower() in passage.lower() for passage in shown)
    assert seen > 10


def test_neighbouring_passages_ask_for_what_another_sentence_says(data_dir: Path, tokenizer: TemplateTokenizer) -> None:
    sampler = _sampler(data_dir, tokenizer, Mixture(articles=0, people=0, sheets=0, texts=1, cloze=0))
    asked = 0
    for seed in range(60):
        context = sampler.sample(BatchShape(4, 96), Random(seed))
        shown = " ".join(tokenizer.decode(block) for block in context.blocks)
        for branch in context.branches:
            asked += 1
            answer = tokenizer.decode(branch.answer[:-1]).strip()
            assert answer in shown
            assert answer not in tokenizer.decode(branch.prompt)
    assert asked >= 60


def test_contexts_depend_on_the_seed_alone(data_dir: Path, tokenizer: TemplateTokenizer) -> None:
    sampler = _sampler(data_dir, tokenizer, Mixture())
    shape = BatchShape(3, 72)
    assert sampler.sample(shape, Random("0/7")) == sampler.sample(shape, Random("0/7"))
    assert sampler.sample(shape, Random("0/7")) != sampler.sample(shape, Random("0/8"))


def test_gaps_leave_the_blocks_as_they_are(data_dir: Path, tokenizer: TemplateTokenizer) -> None:
    mixture = Mixture(spread=1.0, spread_tokens=900)
    for seed in range(30):
        context = _sampler(data_dir, tokenizer, mixture).sample(BatchShape(3, 72), Random(seed))
        assert len(context.gaps) == len(context.blocks) + 1
        assert min(context.gaps) >= 0
        assert sum(map(len, context.blocks)) + sum(context.gaps) <= 900
        assert context.gaps[0] == 0


def test_probes_hold_their_answers(data_dir: Path, tokenizer: TemplateTokenizer) -> None:
    probes = _sampler(data_dir, tokenizer, Mixture()).probes(BatchShape(4, 128), 10, Random(0))
    assert probes["articles"]
    for contexts in probes.values():
        for context in contexts:
            assert len(context.branches) == 1
            answer = tokenizer.decode(context.branches[0].answer[:-1])
            assert any(answer in tokenizer.decode(block) for block in context.blocks)


def test_batches_grow_with_the_training() -> None:
    early = [batch_shape(Random(seed), 0.0, Mixture()) for seed in range(200)]
    late = [batch_shape(Random(seed), 0.9, Mixture()) for seed in range(400)]
    assert max(shape.passages for shape in early) == 4
    assert {shape.passages for shape in late} == {*range(1, 11), 20}
    assert max(shape.passage_tokens for shape in late) == 128
