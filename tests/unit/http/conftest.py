"""What the tests of the HTTP door share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from .standin import StandIn, served


@pytest.fixture
def gateway() -> StandIn:
    """The gateway that ``client`` talks to."""
    return StandIn()


@pytest.fixture
async def client(gateway: StandIn) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the door before ``gateway``."""
    async with served(gateway, gateway.settings) as connected:
        yield connected
