from __future__ import annotations

import pytest

from blockrag.evaluation.ttft_model import METHODS, measure_model_ttft
from blockrag.modeling.bundle import Bundle, load_bundle
from tests.models import make_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


def test_measures_every_method_at_every_length(bundle: Bundle) -> None:
    rounds: list[tuple[int, int]] = []
    rows = measure_model_ttft(
        bundle, (64, 200), question_tokens=9, repeats=2, progress=lambda *done: rounds.append(done)
    )
    assert [(row.context_tokens, row.method) for row in rows] == [
        (context, method) for context in (64, 200) for method in METHODS
    ]
    assert all(row.repeats == 2 and 0 < row.min_ms <= row.p50_ms <= row.max_ms for row in rows)
    assert all(row.times_none == 1 for row in rows if row.method == "none")
    assert all(row.share_of_stock == 1 for row in rows if row.method == "stock")
    assert rounds == [(1, 3), (2, 3), (3, 3)]


def test_refuses_a_context_that_does_not_fit(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="where the model has 2048"):
        measure_model_ttft(bundle, (2048,), repeats=1)
