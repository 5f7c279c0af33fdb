"""Times of plans, with a tiny bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.errors import SettingsError
from blockrag.evaluation.plan_time import measure_plans
from blockrag.evaluation.ttft_grpc import first_passages
from blockrag.modeling.bundle import load_bundle
from blockrag.results import GivenPassage
from blockrag.settings import Settings
from tests.models import make_tiny_bundle
from tests.refrag_bundles import make_refrag_bundle

PASSAGES = [GivenPassage("the capital of the country is the largest city of the land", "title")] * 3


async def test_every_policy_of_the_bundle_is_timed(tmp_path: Path) -> None:
    plain = load_bundle(make_tiny_bundle(tmp_path / "plain"))
    bundle = make_refrag_bundle(plain, tmp_path / "compressing", width=16, chunk_tokens=4, decoder_width=32)
    done: list[tuple[int, int]] = []
    times = await measure_plans(
        bundle, Settings(), PASSAGES, rate=2, repeats=3, warmup=1, on_progress=lambda *step: done.append(step)
    )
    assert [row.policy for row in times] == ["off", "retrieval", "blind", "query"]
    assert done[-1] == (4, 4)
    for row in times:
        assert 0 <= row.policy_ms < row.median_ms <= row.p90_ms
        assert (row.policy_ms > 0) == (row.policy in ("blind", "query"))
        assert (row.passages, row.repeats) == (3, 3)
        assert row.chunks == times[0].chunks > 0
    [alone] = await measure_plans(plain, Settings(), PASSAGES, rate=2, repeats=1)
    assert alone.policy == "off"


def test_passages_of_the_sample_are_nearly_full(small_bundle: Path) -> None:
    bundle = load_bundle(small_bundle, verify_files=False)
    tokenizer = bundle.load_tokenizer()
    passages = first_passages(bundle, 20)
    sizes = [len(bundle.template.passage_ids(tokenizer, given.title, given.text)) for given in passages]
    assert len(set(passages)) == 20
    assert min(sizes) >= 0.75 * bundle.passage_tokens >= 0.75 * max(sizes)
    with pytest.raises(SettingsError, match="only"):
        first_passages(bundle, 10**6)
