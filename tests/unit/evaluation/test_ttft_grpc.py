from pathlib import Path

import pytest

from blockrag.errors import SettingsError
from blockrag.evaluation.ttft_grpc import make_workload
from blockrag.modeling.bundle import load_bundle


def test_contexts_have_their_sizes_and_share_no_passage(small_bundle: Path) -> None:
    bundle = load_bundle(small_bundle, verify_files=False)
    workload = make_workload(bundle, (256, 512))
    tokenizer = bundle.load_tokenizer()
    for size, passages in workload.contexts.items():
        tokens = sum(len(bundle.template.passage_ids(tokenizer, item.title, item.text)) for item in passages)
        assert size <= tokens < size + bundle.passage_tokens
    taken = [passage for passages in (*workload.contexts.values(), workload.displacing) for passage in passages]
    assert len(set(taken)) == len(taken)


def test_contexts_larger_than_the_corpus_are_refused(small_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="too few passages"):
        make_workload(load_bundle(small_bundle, verify_files=False), (10**9,))
