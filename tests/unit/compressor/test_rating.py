"""Policies at inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blockrag.compressor.rating import ChunkRater
from blockrag.errors import DataError
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.refrag.policy import ChunkPolicy, make_policy_input
from blockrag.modeling.refrag.policy_features import TokenTraits
from blockrag.modeling.refrag.record import policy_file
from tests.refrag_bundles import make_refrag_bundle


@pytest.fixture(scope="module")
def bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    plain = load_bundle(small_bundle, verify_files=False)
    out = tmp_path_factory.mktemp("rating") / "compressing"
    return make_refrag_bundle(plain, out, width=64, chunk_tokens=8, decoder_width=256)


def rate(rater: ChunkRater, bundle: Bundle, policy: str, texts: list[str]) -> np.ndarray:
    tokenizer = bundle.load_tokenizer()
    passages = [bundle.template.passage_ids(tokenizer, "Norway", text) for text in texts]
    question = bundle.template.final_ids(tokenizer, "What is the capital of Norway?")
    embeddings = [rater.embed_question(ids) for ids in passages]
    asked = rater.embed_question(question) if rater.sees_question(policy) else None
    return rater.rate(policy, passages, embeddings, question, asked, list(range(len(passages))))


TEXTS = [
    f"Oslo is the capital of Norway, which has {place} million inhabitants and many fjords. " * 4 for place in "59362"
]


@pytest.mark.parametrize("policy", ["query", "blind"])
def test_ranks_are_those_of_training(bundle: Bundle, policy: str) -> None:
    """Retrieval's for a policy that sees the question; for the other the last passage is the first."""
    rater, tokenizer = ChunkRater.load(bundle), bundle.load_tokenizer()
    passages = [bundle.template.passage_ids(tokenizer, "Norway", text) for text in TEXTS]
    question = bundle.template.final_ids(tokenizer, "What is the capital of Norway?") if policy == "query" else []
    embeddings = [rater.embed_question(ids) for ids in passages]
    retrieved = [3, 0, 4, 1, 2]
    seen = make_policy_input(
        passages,
        embeddings,
        question,
        rater.embed_question(question) if question else embeddings[0][:0],
        chunk_tokens=bundle.chunk_tokens,
        traits=TokenTraits.of(tokenizer),
        ranks=retrieved if policy == "query" else [4, 3, 2, 1, 0],
    )
    asked = rater.embed_question(question) if question else None
    found = rater.rate(policy, passages, embeddings, question, asked, retrieved)
    expected = ChunkPolicy.load(bundle.path / policy_file(policy)).rate(seen)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_logits_that_are_no_number_are_refused(bundle: Bundle) -> None:
    rater = ChunkRater.load(bundle)
    passage = list(range(16))
    embeddings = torch.full_like(rater.embed_question(passage), float("nan"))
    with pytest.raises(DataError, match="finite"):
        rater.rate("blind", [passage], [embeddings], (), None, [0])
