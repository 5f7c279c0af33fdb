"""Another bundle takes the place of the one that serves, under load: nobody is refused, nothing old is left.

In the old one's place, as on one machine; and beside it, as KubeRay's NewCluster does it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.configured import configured_bundle, configured_keys
from blockrag.kv_cache.block_files import block_paths, read_header
from blockrag.local import LocalSystem
from blockrag.settings import BundleSettings, Settings
from tests.models import make_small_bundle
from tests.system.faults import Load, Request, fault_settings

_PATIENCE_S = 90.0
"""Of the clients: well above the time of a start."""


def _with(settings: Settings, bundle: Path) -> Settings:
    return settings.model_copy(update={"bundle": BundleSettings(path=str(bundle))})


async def _right_answers(target: str) -> dict[str, str]:
    async with BlockragClient(target) as client:
        load = Load(client, 1.0, seed=0)
        await load.prepare()
        return load.answers


async def _replaced(old: LocalSystem, new: Settings, after: dict[str, str]) -> tuple[LocalSystem, list[Request], float]:
    """The new system, the requests of all the while, and for how long nobody answered."""
    async with BlockragClient(old.target, timeout_s=120, patience_s=_PATIENCE_S) as client:
        load = Load(client, 2.0, seed=0)
        await load.prepare()
        assert load.answers != after
        before, stop = load.answers, asyncio.Event()
        load.right = {name: {before[name], after[name]} for name in before}
        running = asyncio.create_task(load.run(stop))
        await asyncio.sleep(3)
        await asyncio.to_thread(old.stop)
        system = await asyncio.to_thread(lambda: LocalSystem.start(new, owned=True))
        load.right = {name: {answer} for name, answer in after.items()}
        await asyncio.sleep(5)
        stop.set()
        await running
        ends = sorted(each.started + each.seconds for each in load.done)
        return system, load.done, max(later - earlier for earlier, later in itertools.pairwise(ends))


@pytest.mark.own_cluster
@pytest.mark.timeout(600)
def test_nobody_is_refused_while_another_bundle_takes_over(small_bundle: Path, tmp_path: Path) -> None:
    old = fault_settings(tmp_path / "state", str(small_bundle))
    new = _with(old, make_small_bundle(tmp_path / "new", seed=1))
    with LocalSystem.start(new, owned=True) as system:
        after = asyncio.run(_right_answers(system.target))
    system = LocalSystem.start(old, owned=True)
    system, requests, gap_s = asyncio.run(_replaced(system, new, after))
    with system:
        assert [each for each in requests if each.error or each.wrong] == []
        assert gap_s < _PATIENCE_S
        bundle = configured_bundle(new)
        keys = configured_keys(new, bundle)
        kept = list(block_paths(new.disk_path))
        assert kept
        for path in kept:
            read_header(path, keys)  # of the new weights


class Questions(Load):
    """Those requests of the load that change nothing: each system here has an index of its own."""

    async def _one(self, chance: float, name: str, number: int) -> None:
        await super()._one(0.8 * chance, name, number)


class Service:
    """What a Kubernetes Service is to its clients: one address, behind which new connections go to who is chosen."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[str, None]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        try:
            yield "{}:{}".format(*server.sockets[0].getsockname())
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        host, _, port = self.target.rpartition(":")
        with suppress(OSError, asyncio.CancelledError):
            there, away = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_pumped(reader, away), _pumped(there, writer))
        writer.close()


async def _pumped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()


async def _switched(old: LocalSystem, new: LocalSystem, after: dict[str, str]) -> tuple[list[Request], float]:
    """The requests of clients with the patience that they have by default, and for how long nobody answered."""
    service = Service(old.target)
    async with service.listening() as address, BlockragClient(address, timeout_s=60) as client:
        load = Questions(client, 2.0, seed=0)
        await load.prepare()
        before, stop = load.answers, asyncio.Event()
        assert before != after
        load.right = {name: {before[name], after[name]} for name in before}
        running = asyncio.create_task(load.run(stop))
        await asyncio.sleep(3)
        service.target = new.target
        await asyncio.sleep(2)
        await asyncio.to_thread(old.stop)
        load.right = {name: {answer} for name, answer in after.items()}
        await asyncio.sleep(5)
        stop.set()
        await running
        ends = sorted(each.started + each.seconds for each in load.done)
        return load.done, max(later - earlier for earlier, later in itertools.pairwise(ends))


@pytest.mark.own_cluster
@pytest.mark.timeout(600)
def test_nobody_is_refused_while_clients_move_to_a_second_system_beside_the_first(
    small_bundle: Path, tmp_path: Path
) -> None:
    blue = fault_settings(tmp_path / "blue", str(small_bundle))
    with LocalSystem.start(blue, owned=True) as old:
        green = _with(fault_settings(tmp_path / "green", ""), make_small_bundle(tmp_path / "new", seed=1))
        with LocalSystem.start(green, owned=True) as new:
            after = asyncio.run(_right_answers(new.target))
            requests, gap_s = asyncio.run(_switched(old, new, after))
    assert [each for each in requests if each.error or each.wrong] == []
    assert len(requests) >= 15
    assert gap_s < 10
