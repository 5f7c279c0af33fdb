"""Policies at inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockrag.compressor.rating import ChunkRater
from blockrag.errors import DataError
from blockrag.modeling.bundle import Bundle, load_bundle
from tests.refrag_bundles import make_refrag_bundle


@pytest.fixture(scope="module")
def bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    plain = load_bundle(small_bundle, verify_files=False)
    out = tmp_path_factory.mktemp("rating") / "compressing"
    return make_refrag_bundle(plain, out, width=64, chunk_tokens=8, decoder_width=256)


def test_logits_that_are_no_number_are_refused(bundle: Bundle) -> None:
    rater = ChunkRater.load(bundle)
    passage = list(range(16))
    embeddings = torch.full_like(rater.embed_question(passage), float("nan"))
    with pytest.raises(DataError, match="finite"):
        rater.rate("blind", [passage], [embeddings], (), None, [0])
