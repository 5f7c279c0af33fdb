from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.modeling.refrag.chunks import chunk_bounds, chunk_count, effective_rate


@given(st.integers(min_value=1, max_value=500), st.integers(min_value=1, max_value=64))
def test_chunks_cover_the_block_in_order(tokens: int, chunk: int) -> None:
    bounds = chunk_bounds(tokens, chunk)
    assert [position for start, end in bounds for position in range(start, end)] == list(range(tokens))
    assert all(end - start == chunk for start, end in bounds[:-1])
    assert chunk_count(tokens, chunk) == len(bounds)


def test_effective_rate() -> None:
    assert effective_rate(64, 8) == 8
    assert effective_rate(7, 7) == 1


@pytest.mark.parametrize(("tokens", "chunk"), [(0, 4), (-1, 4), (4, 0)])
def test_refuses_empty_blocks_and_chunks(tokens: int, chunk: int) -> None:
    for function in (chunk_bounds, chunk_count):
        with pytest.raises(ValueError, match="at least"):
            function(tokens, chunk)
    with pytest.raises(ValueError, match="0 slots for 3 tokens"):
        effective_rate(3, 0)
    with pytest.raises(ValueError, match="4 slots for 3 tokens"):
        effective_rate(3, 4)
