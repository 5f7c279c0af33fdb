"""Another bundle takes the place of the one that serves, under load: nobody is refused, nothing old is left."""

from __future__ import annotations

import asyncio
import itertools
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
