"""Encoder and decoder follow a load that rises and falls; nobody notices but by waiting less."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.settings import Settings
from tests.system.faults import COLLECTION, FACTS, Load, fault_settings, processes

_POOLS = ("encoder", "decoder")
_MOST_S = 120.0


def _settings(folder: Path, bundle: Path) -> Settings:
    plain = fault_settings(folder / "state", str(bundle))
    return plain.model_copy(
        update={
            "cluster": plain.cluster.model_copy(update={"upscale_delay_s": 1.0, "downscale_delay_s": 4.0}),
            "encoder": plain.encoder.model_copy(update={"max_replicas": 2, "target_ongoing_requests": 2}),
            "decoder": plain.decoder.model_copy(update={"max_replicas": 2, "target_ongoing_requests": 2}),
        }
    )


async def _until(system: LocalSystem, replicas: int) -> float:
    """Until each pool has so many; how long it took."""
    began = time.monotonic()
    while any(len(processes(system, pool)) != replicas for pool in _POOLS):
        waited = time.monotonic() - began
        assert waited < _MOST_S, {pool: len(processes(system, pool)) for pool in _POOLS}
        await asyncio.sleep(0.5)
    return time.monotonic() - began


async def _ask(client: BlockragClient, stop: asyncio.Event) -> None:
    """Long answers, one after another; each must be whole."""
    while not stop.is_set():
        answer = await client.ask(
            f"Say all of {next(iter(FACTS))}.", collection=COLLECTION, top_k=3, max_tokens=150, stop=[], timeout_s=90
        )
        assert answer.completion.usage.completion_tokens > 0


async def _warm(client: BlockragClient, stop: asyncio.Event, number: int) -> None:
    """Documents that nobody has encoded."""
    for turn in itertools.count():
        if stop.is_set():
            return
        text = "\n\n".join(
            f"Part {part} of volume {turn}, series {number}. " + "It goes on. " * 40 for part in range(8)
        )
        await client.ingest_text(f"volume-{number}-{turn}", text, collection=f"{COLLECTION}-volumes")
        async for _ in client.warm(collection=f"{COLLECTION}-volumes", document_ids=[f"volume-{number}-{turn}"]):
            pass


async def _rise_and_fall(system: LocalSystem) -> Load:
    async with BlockragClient(system.target, timeout_s=90, patience_s=60) as client:
        load = Load(client, per_second=2.0, seed=0)
        await load.prepare()
        assert [len(processes(system, pool)) for pool in _POOLS] == [1, 1]
        stop, quiet = asyncio.Event(), asyncio.Event()
        always = asyncio.create_task(load.run(stop))
        async with asyncio.TaskGroup() as busy:
            for _ in range(10):
                busy.create_task(_ask(client, quiet))
            for number in range(4):
                busy.create_task(_warm(client, quiet, number))
            await _until(system, 2)
            await asyncio.sleep(3)  # the new ones take their part
            quiet.set()
        await _until(system, 1)
        stop.set()
        await always
        return load


@pytest.mark.own_cluster
@pytest.mark.timeout(600)
def test_replicas_come_with_the_load_and_go_with_it(small_bundle: Path, tmp_path: Path) -> None:
    with LocalSystem.start(_settings(tmp_path, small_bundle), owned=True) as system:
        load = asyncio.run(_rise_and_fall(system))
    assert [each for each in load.done if each.error or each.wrong] == []
    assert len(load.done) > 20
