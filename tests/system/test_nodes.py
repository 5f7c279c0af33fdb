"""The cluster's own configuration on three machines: asked through each, one cut off, one gone, one new."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.settings import (
    BundleSettings,
    ClusterSettings,
    DecoderSettings,
    EncoderSettings,
    GatewaySettings,
    KvCacheSettings,
    Settings,
)
from tests.system.faults import COLLECTION, FACTS, Load, Request
from tests.system.nodes import Machines, allowed, machines, write_config

pytestmark = [
    pytest.mark.own_cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(allowed()), reason=allowed() or "allowed"),
]

_DECODERS = 2
_CUT_S = 4.0
_GONE_S = 20.0
_LONG_CUT_S = 40.0
_END_S = 60.0
_TIMEOUT_S = 240.0
"""What waits when everything has to start anew, on a slow machine."""


@pytest.fixture(scope="module")
def cluster(small_bundle: Path) -> Iterator[Machines]:
    """The head and two workers, all replicas running, and a third worker on which Ray is not started."""
    with machines(3) as made:
        settings = Settings(
            bundle=BundleSettings(path=str(small_bundle)),
            cluster=ClusterSettings(host="0.0.0.0", state_dir=str(made.folder / "state")),
            gateway=GatewaySettings(max_timeout_ms=int(_TIMEOUT_S * 1000)),
            encoder=EncoderSettings(min_replicas=1, max_replicas=1, threads=1),
            kv_cache=KvCacheSettings(shards=2, budget_mb=96, disk_mb=0),
            decoder=DecoderSettings(replicas=_DECODERS, threads=1, l1_mb=64),
        )
        file = write_config(made.folder, settings)
        for node in made.nodes[:3]:
            made.start(node)
        made.deploy(file)
        made.wait(_complete)
        yield made


def _complete(replicas: dict[str, list[str]]) -> bool:
    wanted = {"Gateway": 2, "Compressor": 2, "Decoder": _DECODERS}
    return len(replicas) == 11 and all(len(found) >= wanted.get(name, 1) for name, found in replicas.items())


async def _under_load(machines: Machines, act: Callable[[], None], settle_s: float) -> list[Request]:
    """What clients of the head's door see while something is done and for so long afterwards."""
    async with BlockragClient(machines.head.target, timeout_s=_TIMEOUT_S, patience_s=_TIMEOUT_S) as client:
        load = Load(client, 2.0, seed=0, timeout_s=_TIMEOUT_S)
        await load.prepare()
        stop = asyncio.Event()
        running = asyncio.create_task(load.run(stop))
        await asyncio.sleep(3)
        await asyncio.to_thread(act)
        await asyncio.sleep(settle_s)
        stop.set()
        await running
    return load.done


def _bad(requests: list[Request]) -> list[tuple[str, str, str, float]]:
    return [(each.kind, each.error, each.wrong, each.seconds) for each in requests if each.error or each.wrong]


def test_each_machine_answers_and_blocks_cross_the_wires(cluster: Machines) -> None:
    replicas = cluster.replicas()
    decoders = [node for node in cluster.workers if node.address in replicas["Decoder"]]
    assert len(decoders) == _DECODERS  # one each
    [encoder] = replicas["EncoderPool"]
    apart = next(node for node in decoders if node.address != encoder)

    async def ask(target: str) -> list[str]:
        async with BlockragClient(target) as client:
            asked = [
                client.ask(f"What is the capital of {name}?", collection=COLLECTION, max_tokens=6) for name in FACTS
            ]
            return [answer.text for answer in await asyncio.gather(*asked)]

    async def everywhere() -> list[list[str]]:
        async with BlockragClient(cluster.head.target) as client:
            for name, fact in FACTS.items():
                await client.ingest_text(name, fact * 80, title=name, collection=COLLECTION)
        # All at once: a decoder whose machine holds the blocks is asked first, and others while it is busy.
        return await asyncio.gather(
            *(ask(target) for target in [cluster.head.target, *(node.target for node in decoders)])
        )

    before = apart.received_bytes()
    answers = asyncio.run(everywhere())
    assert all(each == answers[0] for each in answers)
    assert apart.received_bytes() - before > 2**20


def test_a_machine_that_is_cut_off_for_seconds_fails_nothing(cluster: Machines) -> None:
    [encoder] = cluster.replicas()["EncoderPool"]
    node = next(node for node in cluster.workers if node.address == encoder)
    before = cluster.replicas()

    def cut_off() -> None:
        node.cut()
        time.sleep(_CUT_S)
        node.mend()

    requests = asyncio.run(_under_load(cluster, cut_off, 10))
    assert _bad(requests) == []
    assert cluster.replicas() == before


def test_machines_that_vanish_are_done_without_and_a_new_one_takes_their_place(cluster: Machines) -> None:
    first, second, new = cluster.workers
    requests = asyncio.run(_under_load(cluster, first.die, _GONE_S))
    assert _bad(requests) == []
    cluster.wait(_complete)
    assert first.address not in _used(cluster)

    # Serve moves nothing to a machine that is new, but what is lost is started there.
    cluster.start(new)
    requests = asyncio.run(_under_load(cluster, second.die, _GONE_S))
    # Questions wait, and so do documents, until as many wait as may.
    assert [each for each in _bad(requests) if "documents are being received" not in each[1]] == []
    cluster.wait(_complete)
    assert _used(cluster) == {cluster.head.address, new.address}


def test_a_machine_that_is_cut_off_for_longer_is_taken_for_gone_and_joins_anew(cluster: Machines) -> None:
    _, second, only = cluster.workers
    second.mend()
    cluster.start(second)

    def cut_off() -> None:
        only.cut()
        time.sleep(_LONG_CUT_S)
        only.mend()

    requests = asyncio.run(_under_load(cluster, cut_off, _GONE_S))
    # Everything ran there: requests wait, until as many wait as may.
    assert [each for each in _bad(requests) if "OverloadedError" not in each[1]] == []
    cluster.wait(_complete)
    assert _used(cluster) == {cluster.head.address, second.address}
    # It hears that it is taken for gone, and nothing of it is left that could answer.
    assert only.ray is not None
    only.ray.wait(_END_S)
    until = time.monotonic() + _END_S
    while only.processes():
        assert time.monotonic() < until, only.processes()
        time.sleep(0.5)
    cluster.start(only)
    assert cluster.replicas()["Gateway"]


def _used(cluster: Machines) -> set[str]:
    return {address for found in cluster.replicas().values() for address in found}
