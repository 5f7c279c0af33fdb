"""What tests of compiled passes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from blockrag.modeling.native import kernels as native


@pytest.fixture(scope="module")
def compiled() -> None:
    """Skips where there are no compiled kernels."""
    if native.kernels() is None:
        pytest.skip("no compiled kernels on this machine")


@pytest.fixture(params=[1, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
