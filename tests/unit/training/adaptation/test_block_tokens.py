from __future__ import annotations

import pytest
import torch

from blockrag.errors import BundleError
from blockrag.training.adaptation.source import add_block_tokens, with_block_tokens
from tests.models import TEST_TEMPLATE, TINY_VOCAB, make_tiny_model, make_tiny_tokenizer


def test_they_stand_around_every_passage_as_tokens_of_their_own() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    template = with_block_tokens(TEST_TEMPLATE, links=2, sinks=1)

    ids = add_block_tokens(model, tokenizer, links=2, sinks=1, seed=0)

    plain = TEST_TEMPLATE.passage_ids(tokenizer, "T", "text")
    assert template.passage_ids(tokenizer, "T", "text") == [ids[0], *plain, ids[1], ids[2]]
    assert template.final == TEST_TEMPLATE.final and template.instruction == TEST_TEMPLATE.instruction


def test_text_in_a_passage_cannot_write_them() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    ids = add_block_tokens(model, tokenizer, links=1, sinks=0, seed=0)
    template = with_block_tokens(TEST_TEMPLATE, links=1, sinks=0)

    assert template.passage_ids(tokenizer, "<|link_0|>", "a <|link_0|> b").count(ids[0]) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_and_old_rows_stay(tied: bool) -> None:
    model, tokenizer = make_tiny_model(tie_word_embeddings=tied), make_tiny_tokenizer()
    before = [head.weight.detach().clone() for head in (model.get_input_embeddings(), model.get_output_embeddings())]

    ids = add_block_tokens(model, tokenizer, links=3, sinks=2, seed=0)

    assert ids == list(range(TINY_VOCAB, TINY_VOCAB + 5))
    assert model.config.vocab_size == TINY_VOCAB + 5
    for old, head in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(head.weight[:TINY_VOCAB], old)
        new = head.weight.detach()[ids]
        assert float((new - old.mean(0)).abs().max()) < float(old.std()), "they start near the vocabulary's mean"
        assert len(torch.unique(new, dim=0)) == 5
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_rows_to_spare_are_used_first() -> None:
    model, tokenizer = make_tiny_model(vocab_size=320), make_tiny_tokenizer()

    assert add_block_tokens(model, tokenizer, links=2, sinks=0, seed=0) == [300, 301]
    assert model.config.vocab_size == 320


def test_none_changes_nothing() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()

    assert add_block_tokens(model, tokenizer, links=0, sinks=0, seed=0) == []
    assert len(tokenizer) == TINY_VOCAB
    assert with_block_tokens(TEST_TEMPLATE, 0, 0) == TEST_TEMPLATE


def test_a_template_that_has_them_is_not_given_them_again() -> None:
    with pytest.raises(BundleError, match=r"holds <\|link_0\|> already"):
        with_block_tokens(with_block_tokens(TEST_TEMPLATE, 1, 0), 2, 0)
