"""The machine's clock jumps under a running system: nothing fails, nothing is wrong.

The clock of every Python process of the system is moved, by a library that is loaded before theirs
(``moved_clock.c``); Ray's own two and HAProxy keep theirs.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from tests.system.faults import COLLECTION, Load, fault_settings

_HOUR = 3600
_JUMPS = (_HOUR, 0, -_HOUR, 0, 24 * _HOUR, 0)
_STAY_S = 5.0


async def _moved_by(client: BlockragClient, service: str) -> float:
    """Seconds that a service's clock is ahead, by a span of it."""
    answer = await client.ask("What is the capital of Peru?", collection=COLLECTION, max_tokens=2)
    spans = await client.trace(answer.completion.trace_id)
    (start, *_) = [span.start_unix_ns for span in spans if span.service == service]
    return start / 1e9 - time.time()


async def _jumping(target: str, move: Callable[[int], None]) -> Load:
    async with BlockragClient(target, timeout_s=60) as client:
        load, stop = Load(client, 2.0, seed=0), asyncio.Event()
        await load.prepare()
        running = asyncio.create_task(load.run(stop))
        for seconds in _JUMPS:
            move(seconds)
            await asyncio.sleep(_STAY_S)
            for service in ("gateway", "retriever", "decoder"):
                assert await _moved_by(client, service) == pytest.approx(seconds, abs=60)
        stop.set()
        await running
        return load


@pytest.mark.own_cluster
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_clock_jumps_an_hour_ahead_and_back_and_a_day(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, moved = tmp_path / "moved_clock.so", tmp_path / "seconds"
    source = Path(__file__).with_name("moved_clock.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    moved.write_bytes(bytes(8))

    def move(seconds: int) -> None:
        with moved.open("r+b") as file:  # which is mapped
            file.write(seconds.to_bytes(8, "little", signed=True))

    with monkeypatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(library))
        environment.setenv("MOVED_CLOCK", str(moved))
        system = LocalSystem.start(fault_settings(tmp_path / "state", str(small_bundle)), owned=True)
    with system:
        load = asyncio.run(_jumping(system.target, move))
    assert [each for each in load.done if each.error or each.wrong] == []
    assert len(load.done) > 2 * len(_JUMPS) * _STAY_S * 0.9
