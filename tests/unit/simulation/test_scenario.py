"""What a scenario takes, and times read from a benchmark's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.simulation.scenario import Scenario, StageTimes, prefill_seconds
from blockrag.simulation.workload import Workload


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machines", 0),
        ("rate", 0.0),
        ("rate", float("nan")),
        ("passages", 3),
        ("top_k", 11),
        ("exponent", -0.1),
        ("l1_mb", -1.0),
        ("questions", 0),
    ],
)
def test_a_wrong_number_is_named(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Scenario(**{field: value})  # type: ignore[arg-type]
    assert field in str(caught.value) or caught.value.field == "variety"


def test_the_same_questions_each_time() -> None:
    first, second = (list(Workload(Scenario(seed=3)).questions(50)) for _ in range(2))
    assert first == second
    assert first != list(Workload(Scenario(seed=4)).questions(50))
    assert all(len(set(each.passages)) == 5 for each in first)


def test_popularity_drifts() -> None:
    still, moving = (
        list(Workload(Scenario(exponent=3.0, drift=drift, rate=1.0)).questions(7_200)) for drift in (0.0, 10.0)
    )
    assert {each.passages[0] // 10 for each in still[:100]} & {each.passages[0] // 10 for each in still[-100:]}
    late = [each.passages[0] // 10 for each in moving[-100:]]
    assert sorted(late)[50] >= 15


def rows(times: StageTimes, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    found = []
    for size in sizes:
        seconds = {
            "none": times.prefill_s,
            "block_l1": times.prefill_s + times.slot_s * size,
            "block_cold": times.prefill_s + (times.slot_s + times.encode_s) * size,
            "full": times.prefill_s + times.token_s * size + times.pair_s * size * size / 2,
        }
        found += [
            {"path": "model", "state": state, "context_tokens": size, "median_ms": 1000 * value}
            for state, value in seconds.items()
        ]
    return found


def test_times_are_read_from_a_benchmark(tmp_path: Path) -> None:
    made = StageTimes(prefill_s=0.05, slot_s=1e-5, token_s=5e-4, pair_s=2e-7, encode_s=6e-4)
    file = tmp_path / "ttft.json"
    file.write_text(json.dumps({"rows": rows(made, (512, 2048, 7680))}), encoding="utf-8")

    read = StageTimes.of_bench(file)

    for name in ("prefill_s", "slot_s", "token_s", "pair_s", "encode_s"):
        assert getattr(read, name) == pytest.approx(getattr(made, name), rel=1e-6), name
    assert prefill_seconds(read, 0, 1_000) == pytest.approx(0.06)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": [{}]}', '{"rows": []}', json.dumps({"rows": rows(StageTimes(), (512,))})]
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ttft.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequestError, match="bench"):
        StageTimes.of_bench(file)
