"""Kills parts of a running system under an open-loop load, and measures what its clients see.

``python -m tests.system.faults --kills 3`` starts a system of its own with the reader that ships and prints the table
of docs/operations.md; tests/system/test_recovery.py is the short form.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockrag.client import BlockragClient
from blockrag.errors import BlockragError, NotFoundError, OverloadedError
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.local.state import read_state
from blockrag.settings import BundleSettings, ClusterSettings, EncoderSettings, KvCacheSettings, Settings

COLLECTION = "faults"
FACTS = {
    "Norway": "The capital of Norway is Oslo.",
    "Fiji": "The capital of Fiji is Suva.",
    "Peru": "The capital of Peru is Lima.",
    "Ghana": "The capital of Ghana is Accra.",
    "Nepal": "The capital of Nepal is Kathmandu.",
    "Cuba": "The capital of Cuba is Havana.",
}
TARGETS = ("gateway", "compressor", "retriever", "index", "encoder", "shard", "decoder", "haproxy")
RAY = ("gcs", "raylet")
"""Without which Ray does not go on: everything starts anew."""
_REPLICA = {
    "gateway": "ServeReplica:gateway:Gateway",
    "compressor": "ServeReplica:compressor:Compressor",
    "retriever": "ServeReplica:retriever:Retriever",
    "encoder": "ServeReplica:encoder:EncoderPool",
    "shard": "ServeReplica:kv_cache:KvCacheShard-0",
    "decoder": "ServeReplica:decoder:Decoder",
    "index": "blockrag.retriever.edge_worker",
    "haproxy": "/haproxy.cfg",
    "gcs": "/gcs/gcs_server",
    "raylet": "/raylet/raylet",
}
MAX_TOKENS = 6


@dataclass(frozen=True)
class Request:
    """One request of the load."""

    kind: str
    started: float
    seconds: float
    error: str = ""
    wrong: str = ""
    """How its answer differs from the one without faults."""


@dataclass
class Load:
    """An open loop: requests start when they are due, whatever has become of the others."""

    client: BlockragClient
    per_second: float
    seed: int
    done: list[Request] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    """Without faults."""
    right: dict[str, set[str]] = field(default_factory=dict)
    """Those that count as right: the one without faults, unless somebody says otherwise."""
    timeout_s: float = 90.0
    """Of a question."""
    versions: dict[str, int] = field(default_factory=dict)
    """Of documents that change: the newest that was acknowledged."""

    async def prepare(self) -> None:
        """Stores the documents, and has each question answered once."""
        for name, fact in FACTS.items():
            await self.client.ingest_text(name, fact, title=name, collection=COLLECTION)
        for name in FACTS:
            self.answers[name] = await self._answer(name)
            self.right[name] = {self.answers[name]}

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set and everything that was begun has ended."""
        draw = random.Random(self.seed)
        tasks = []
        due = time.monotonic()
        number = 0
        while not stop.is_set():
            tasks.append(asyncio.create_task(self._one(draw.random(), draw.choice(list(FACTS)), number)))
            number += 1
            due += 1 / self.per_second
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(due - time.monotonic(), 0.0))
        await asyncio.gather(*tasks)

    async def _one(self, chance: float, name: str, number: int) -> None:
        kind, work = (
            ("question", self._question(name))
            if chance < 0.7
            else ("retrieve", self._retrieve(name))
            if chance < 0.8
            else ("update", self._update(name))
            if chance < 0.9
            else ("delete", self._delete(f"gone-{number}"))
        )
        started = time.monotonic()
        error = wrong = ""
        try:
            wrong = await work
        except BlockragError as failure:
            error = f"{type(failure).__name__}: {failure}"
        self.done.append(Request(kind, started, time.monotonic() - started, error, wrong))

    async def _answer(self, name: str) -> str:
        question = f"What is the capital of {name}?"
        answer = await self.client.ask(
            question,
            collection=COLLECTION,
            top_k=3,
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            timeout_s=self.timeout_s,
        )
        return answer.text

    async def _question(self, name: str) -> str:
        expected = self.right[name]
        answer = await self._answer(name)
        return "" if answer in expected | self.right[name] else f"{answer!r}, not {expected!r}"

    async def _retrieve(self, name: str) -> str:
        found = await self.client.retrieve(f"capital of {name}", collection=COLLECTION, top_k=3)
        return "" if name in [passage.title for passage in found] else f"{name} was not found"

    async def _update(self, name: str) -> str:
        document, collection = f"news-{name}", f"{COLLECTION}-news"
        acknowledged = self.versions.get(document, 0)
        version = acknowledged + 1
        await self.client.ingest_text(document, f"Report {version} of {name}.", collection=collection)
        self.versions[document] = max(self.versions.get(document, 0), version)
        await self._warm(collection, document)
        found = await self.client.retrieve(f"report of {name}", collection=collection, top_k=10)
        texts = [passage.text for passage in found if passage.document_id == document]
        numbers = [int(text.split()[1]) for text in texts]
        return "" if numbers and min(numbers) > acknowledged else f"version {version} of {document} is stale: {texts}"

    async def _warm(self, collection: str, document: str) -> None:
        """Through the compressor, which tokenises it, and the cache."""
        while True:
            try:
                async for _ in self.client.warm(collection=collection, document_ids=[document]):
                    pass
                return
            except OverloadedError as refused:
                # Those that wait for a part that is away take all places: the refusal says when to come back.
                await asyncio.sleep(refused.retry_after_ms / 1000)

    async def _delete(self, document: str) -> str:
        collection = f"{COLLECTION}-gone"
        await self.client.ingest_text(document, f"Secret {document}.", collection=collection)
        await self.client.delete_document(document, collection=collection)
        try:
            found = await self.client.retrieve(f"secret {document}", collection=collection, top_k=10)
        except NotFoundError:
            return ""
        return f"{document} was deleted" if any(passage.document_id == document for passage in found) else ""


@dataclass(frozen=True)
class Fault:
    """What one kill did."""

    target: str
    pid: int
    away_s: float
    """From the kill to the end of the last failed probe, and until the system says that it is ready: how long a client
    that does not send again sees it."""
    replaced_s: float
    """From the kill until as many processes of the kind run as before."""


def processes(system: LocalSystem, target: str) -> list[int]:
    """Process ids of a part of the system."""
    state = read_state(system.settings.state_path)
    assert state is not None
    mark = str(system.settings.state_path / "haproxy") if target == "haproxy" else ""
    named = re.compile(re.escape(_REPLICA[target]) + r"(?!\w)")
    return [pid for pid, line in descendants(state.pid) if named.search(line) and mark in line]


async def kill(system: LocalSystem, target: str, draw: random.Random, settle_s: float) -> Fault:
    """Kills one process of a part, as the kernel would, and watches for ``settle_s`` seconds and until it is back.

    And until what is asked is answered.
    """
    before = processes(system, target)
    assert before, f"no process of {target}"
    # HAProxies of a configuration that was replaced end when what they began is answered: they do not come back.
    wanted = min(len(before), 2) if target == "haproxy" else len(before)
    victim = draw.choice(before)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    last_failure = replaced = 0.0
    async with BlockragClient(system.target, patience_s=0.0, timeout_s=5.0) as probe:
        calls: Sequence[Callable[[], Awaitable[object]]] = (
            probe.list_collections,
            lambda: probe.retrieve("capital", collection=COLLECTION, top_k=1),
        )
        failing = True
        while (passed := time.monotonic() - killed) < settle_s or not replaced or failing:
            assert passed < 120, f"{target} is not back"
            failing = False
            for call in calls:
                try:
                    await call()
                except BlockragError:
                    failing = True
            state = read_state(system.settings.state_path)
            failing |= state is None or state.phase != "ready"
            if failing:
                last_failure = time.monotonic() - killed
            now = processes(system, target)
            if not replaced and victim not in now and len(now) >= wanted:
                replaced = time.monotonic() - killed
            await asyncio.sleep(0.1)
    return Fault(target, victim, last_failure, replaced)


def descendants(root: int) -> Iterator[tuple[int, str]]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    todo = [root]
    while todo:
        for pid in children.get(todo.pop(), []):
            todo.append(pid)
            with contextlib.suppress(OSError):
                yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def private_mib(pid: int) -> float:
    """Memory of a process that it shares with none, in MiB. Raises ``OSError`` when it is gone."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(each.split()[1]) for each in rollup.splitlines() if each.startswith(("Private_", "Swap:"))) / 1024


@dataclass
class Outcome:
    """Everything that was measured."""

    faults: list[Fault]
    windows: list[tuple[str, float, float]]
    requests: list[Request]

    def rows(self) -> list[dict[str, object]]:
        """One per target."""
        rows = []
        for target in dict.fromkeys(fault.target for fault in self.faults):
            faults = [fault for fault in self.faults if fault.target == target]
            windows = [(start, end) for name, start, end in self.windows if name == target]
            met = [each for each in self.requests if any(start <= each.started < end for start, end in windows)]
            rows.append(
                {
                    "killed": target,
                    "times": len(faults),
                    "away_s": _span([fault.away_s for fault in faults]),
                    "replaced_s": _span([fault.replaced_s for fault in faults]),
                    "requests": len(met),
                    "failed": sum(bool(each.error) for each in met),
                    "wrong": sum(bool(each.wrong) for each in met),
                    "longest_s": round(max((each.seconds for each in met), default=0.0), 1),
                    "median_s": round(sorted(each.seconds for each in met)[len(met) // 2], 1) if met else 0.0,
                }
            )
        return rows


def _span(values: Sequence[float]) -> str:
    low, high = round(min(values), 1), round(max(values), 1)
    return f"{low}" if low == high else f"{low} to {high}"


async def measure(
    system: LocalSystem,
    targets: Sequence[str],
    *,
    kills: int,
    settle_s: float,
    per_second: float,
    seed: int,
    on_fault: Callable[[Fault], None] | None = None,
    limit_s: float = math.inf,
    patience_s: float = 15.0,
) -> Outcome:
    """Kills each target so many times, one after another, each when the last one is over; none after ``limit_s``."""
    began = time.monotonic()
    draw = random.Random(seed)
    async with BlockragClient(system.target, timeout_s=60, patience_s=patience_s) as client:
        load = Load(client, per_second, seed)
        await load.prepare()
        stop = asyncio.Event()
        running = asyncio.create_task(load.run(stop))
        outcome = Outcome([], [], load.done)
        await asyncio.sleep(settle_s / 2)
        for target in list(targets) * kills:
            started = time.monotonic()
            if started - began > limit_s:
                break
            outcome.faults.append(await kill(system, target, draw, settle_s))
            outcome.windows.append((target, started, time.monotonic()))
            if on_fault is not None:
                on_fault(outcome.faults[-1])
        stop.set()
        await running
    return outcome


def fault_settings(state_dir: Path, bundle: str) -> Settings:
    """A system of its own on free ports, as it is by default but for the room that it takes."""
    return Settings(
        bundle=BundleSettings(path=bundle),
        cluster=ClusterSettings(
            grpc_port=free_port(), http_port=free_port(), object_store_mb=256, state_dir=str(state_dir)
        ),
        kv_cache=KvCacheSettings(budget_mb=128),
        encoder=EncoderSettings(max_replicas=1),
    )


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--settle", type=float, default=15.0)
    parser.add_argument("--per-second", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"also: {', '.join(RAY)}")
    parser.add_argument("--patience", type=float, default=15.0, help="of the clients, in seconds")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds, the start included, after which nothing more is killed"
    )
    parser.add_argument("--state", default="", help="folder for the system's files, to look at afterwards")
    parser.add_argument("--bundle", default="", help="empty: the reader that ships")
    options = parser.parse_args()
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalSystem.start(
            fault_settings(Path(options.state or folder) / "state", options.bundle), owned=True
        ) as system,
    ):
        outcome = asyncio.run(
            measure(
                system,
                options.targets.split(","),
                kills=options.kills,
                settle_s=options.settle,
                per_second=options.per_second,
                seed=options.seed,
                on_fault=lambda fault: print(fault, flush=True),
                limit_s=options.limit - (time.monotonic() - began),
                patience_s=options.patience,
            )
        )
    for row in outcome.rows():
        print(json.dumps(row))
    for each in outcome.requests:
        if each.error or each.wrong:
            print(each.kind, round(each.seconds, 1), each.error or each.wrong)
    print(json.dumps({"requests": len(outcome.requests), "failed": sum(bool(each.error) for each in outcome.requests)}))


if __name__ == "__main__":
    main()
