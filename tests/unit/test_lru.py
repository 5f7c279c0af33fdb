from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.lru import Lru, remembering


def test_the_least_recently_used_goes_first() -> None:
    kept: Lru[str, int] = Lru(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    assert "b" in kept
    kept.put("c", 3)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (1, None, 3)


def test_a_value_that_is_larger_than_the_limit_is_not_kept() -> None:
    kept: Lru[str, bytes] = Lru(3, len)
    kept.put("small", b"1")
    kept.put("large", b"12")
    kept.put("large", b"1234")
    assert ("small" in kept, "large" in kept, kept.size) == (True, False, 1)


def test_a_limit_of_nothing_keeps_nothing_and_a_negative_one_is_refused() -> None:
    kept: Lru[str, int] = Lru(0)
    kept.put("a", 1)
    assert "a" not in kept
    with pytest.raises(ValueError, match="-1"):
        Lru(-1)


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "pop", "clear"]), st.integers(0, 5), st.integers(0, 12))))
def test_sizes_are_kept_and_the_newest_stay(steps: list[tuple[str, int, int]]) -> None:
    kept: Lru[int, str] = Lru(10, len)
    model: dict[int, str] = {}
    for step, key, size in steps:
        if step == "put":
            kept.put(key, "x" * size)
            model.pop(key, None)
            if size <= 10:
                model[key] = "x" * size
            while sum(map(len, model.values())) > 10:
                del model[next(iter(model))]
        elif step == "get":
            if (value := model.pop(key, None)) is not None:
                model[key] = value
            assert kept.get(key) == value
        elif step == "pop":
            assert kept.pop(key) == model.pop(key, None)
        else:
            kept.clear()
            model.clear()
        assert kept.size == sum(map(len, model.values())) <= 10
        assert len(kept) == len(model)


def test_a_function_s_values_are_remembered_by_its_arguments() -> None:
    made: list[tuple[str, int]] = []

    def repeated(text: str, times: int) -> str:
        made.append((text, times))
        return text * times

    known = remembering(repeated, 5, len)
    assert [known("a", 2), known("a", 2), known("b", 3), known("a", 2)] == ["aa", "aa", "bbb", "aa"]
    assert known("c", 1) == "c"
    assert known("b", 3) == "bbb"
    assert made == [("a", 2), ("b", 3), ("c", 1), ("b", 3)]
