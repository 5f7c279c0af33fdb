"""What HTTP adds: how it is read and summed up."""

from __future__ import annotations

import aiohttp

from load_tests.doors import Sample, _summary, stream
from tests.unit.http.standin import StandIn, served


async def test_a_stream_is_read_to_its_end() -> None:
    gateway = StandIn()
    body = {"model": "blockrag/notes", "messages": [{"role": "user", "content": "Where?"}], "stream": True}
    async with served(gateway, gateway.settings) as client, aiohttp.ClientSession() as http:
        seen, details, text = await stream(http, str(client.base_url.join("/v1")), body)
    assert text == "Oslo."
    assert seen >= details["time_to_first_token_ms"] > 0
    assert details["usage"]["cached_tokens"] == 40


def test_what_is_added_leaves_the_model_out() -> None:
    samples = [
        Sample("grpc", seen=103.0, served=100.0),
        Sample("http", seen=205.0, served=200.0),
        Sample("http", seen=55.0, served=50.0),
        Sample("grpc", seen=53.0, served=50.0),
    ]
    found = _summary(samples)
    assert found["grpc"] == {"answers": 2, "first_ms": 78.0, "beyond_ms": 3.0}
    assert found["added_ms"] == 2.0
    assert found["paired_ms"] == (102.0 + 2.0) / 2
