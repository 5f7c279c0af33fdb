"""The disk of the state directory is filled under load, by somebody else, to its last byte, and is emptied again."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.errors import OverloadedError, UnavailableError
from blockrag.local import LocalSystem
from blockrag.settings import KvCacheSettings
from tests.system.faults import COLLECTION, FACTS, TARGETS, Load, Request, fault_settings, processes

_DISK_MIB = 512
_SETTLE_S = 8.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(disk: Path, leave_mib: int) -> None:
    """With a file, until so much is free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filler").open("ab") as filler:
        os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), free - leave_mib * 2**20)


async def _run(system: LocalSystem, disk: Path) -> list[list[Request]]:
    """The load's requests: while little is free, while nothing is, and afterwards."""
    found = []
    async with BlockragClient(system.target, timeout_s=60, patience_s=5.0) as client:
        load = Load(client, 2.0, seed=0)
        await load.prepare()
        for leave_mib in (128, 0, None):
            if leave_mib is None:
                (disk / "filler").unlink()
            else:
                _fill(disk, leave_mib)
                with pytest.raises(OverloadedError, match="MiB free"):
                    await client.ingest_text("late", "Nobody reads this.", collection=COLLECTION)
                if not leave_mib:
                    with pytest.raises(UnavailableError, match="MiB free"):
                        await client.delete_document(next(iter(FACTS)), collection=COLLECTION)
            load.done = []
            stop = asyncio.Event()
            running = asyncio.create_task(load.run(stop))
            await asyncio.sleep(_SETTLE_S)
            stop.set()
            await running
            found.append(load.done)
        documents = {each.document_id async for each in client.list_documents(collection=COLLECTION)}
        assert documents == set(FACTS)
        await client.ingest_text("late", "The capital of Chad is N'Djamena.", collection=COLLECTION)
    return found


@pytest.mark.own_cluster
@pytest.mark.timeout(600)
def test_a_full_disk_refuses_documents_and_answers_questions(small_bundle: Path, disk: Path) -> None:
    settings = fault_settings(disk / "state", str(small_bundle))
    settings = settings.model_copy(update={"kv_cache": KvCacheSettings(budget_mb=128, disk_mb=32)})
    with LocalSystem.start(settings, owned=True) as system:
        watched = [target for target in TARGETS if target != "haproxy"]  # it is replaced as replicas come
        before = {target: processes(system, target) for target in watched}
        little, nothing, afterwards = asyncio.run(_run(system, disk))
        assert {target: processes(system, target) for target in watched} == before
    reads = ("question", "retrieve")
    for requests in (little, nothing):
        assert [each for each in requests if each.kind in reads and (each.error or each.wrong)] == []
        assert [each.wrong for each in requests if each.wrong] == []
        assert any(each.kind in reads for each in requests)
    assert [each for each in afterwards if each.error or each.wrong] == []
