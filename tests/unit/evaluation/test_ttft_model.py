from __future__ import annotations

import pytest

from blockrag.evaluation.ttft_grpc import states_of
from blockrag.evaluation.ttft_model import measure_model_ttft
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.settings import Settings
from tests.models import make_tiny_bundle

SETTINGS = Settings()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


def test_measures_every_method_at_every_length(bundle: Bundle) -> None:
    rounds: list[tuple[int, int]] = []
    rows = measure_model_ttft(
        bundle,
        SETTINGS,
        (64, 200),
        question_tokens=9,
        repeats=2,
        progress=lambda *done: rounds.append(done),
        chunk_tokens=32,
    )
    assert [(row.context_tokens, row.state) for row in rows] == [
        (context, method) for context in (64, 200) for method in states_of("model", 32)
    ]
    assert all(row.repeats == 2 and 0 < row.min_ms <= row.median_ms <= row.max_ms for row in rows)
    assert all(row.ratio_to_none == 1 for row in rows if row.state == "none")
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    slots = {row.state: row.slots for row in rows if row.context_tokens == 200}
    # blocks of 64 tokens and one of 8, in chunks of 32
    assert slots["compressed_l1"] == slots["compressed_copied"] == 7
    assert slots["full"] == slots["block_l1"] == 200 and slots["none"] == 0
    assert 7 <= slots["rate_16"] <= 12 and 7 <= slots["rate_8"] <= 25 < slots["rate_4"] <= 50
    moved = {row.state: row.kv_bytes for row in rows if row.context_tokens == 200}
    # K and V of 3 layers, 2 heads of 8 numbers, float32
    assert moved["rate_8"] == slots["rate_8"] * 2 * 3 * 2 * 8 * 4
    assert moved["none"] == moved["stock"] == moved["full"] == 0


def test_rates_at_or_above_a_chunk_are_not_mixed(bundle: Bundle) -> None:
    assert {"rate_4", "rate_8", "rate_16"} & set(states_of("model", 8)) == {"rate_4"}
    rows = measure_model_ttft(bundle, SETTINGS, (64,), 5, 1, chunk_tokens=4)
    assert {row.state for row in rows} == set(states_of("model", 4))
    plain = states_of("grpc", None)
    assert "compressed_l1" not in plain and "rate_4" not in plain
    assert set(states_of("grpc", 8)) - set(plain) == {"compressed_l1", "rate_4"}


def test_refuses_a_context_that_does_not_fit(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="where the model has 2048"):
        measure_model_ttft(bundle, SETTINGS, (2048,), repeats=1)
