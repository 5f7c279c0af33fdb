"""A running system under an hour of load: memory, files and times must be at its end what they were at its beginning.

``python -m tests.system.soak --minutes 60`` starts a system of its own with the reader that ships, keeps documents
changing under an open-loop load and prints the table of docs/operations.md. Afterwards a thousand questions are asked,
each about a passage that was never seen, and between them ones whose passages are cached.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.local.state import read_state
from tests.system.faults import COLLECTION, FACTS, Load, Request, descendants, fault_settings, private_mib

_WINDOWS = 10
"""Into which the time after warming up is divided; a mean of each is a point of the line, so that neighbouring
samples, which resemble each other, do not count as many."""
_T_95 = 2.306
"""Two-sided 95 % quantile of Student's t with ``_WINDOWS - 2`` degrees of freedom."""


@dataclass(frozen=True)
class Sample:
    """What there is at a time."""

    at_s: float
    memory_mib: dict[str, float]
    """Private memory of each kind of process, all of them together."""
    files: dict[str, tuple[int, float]]
    """Of each folder of the state directory, and of the scratch folder: files, MiB."""


@dataclass(frozen=True)
class Trend:
    """A line through the windows' means."""

    first: float
    last: float
    per_hour: float
    low: float
    high: float
    """Of the 95 % interval of ``per_hour``."""

    @property
    def grows(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0


def trend(times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares over the means of ``_WINDOWS`` equal spans of time. Needs a sample in each."""
    begin, width = times_s[0], (times_s[-1] - times_s[0]) / _WINDOWS
    held: list[list[float]] = [[] for _ in range(_WINDOWS)]
    for at, value in zip(times_s, values, strict=True):
        held[min(int((at - begin) / width), _WINDOWS - 1)].append(value)
    means = [statistics.fmean(each) for each in held]
    hours = [(begin + (place + 0.5) * width) / 3600 for place in range(_WINDOWS)]
    line = statistics.linear_regression(hours, means)
    left = [mean - line.intercept - line.slope * hour for hour, mean in zip(hours, means, strict=True)]
    spread = sum((hour - statistics.fmean(hours)) ** 2 for hour in hours)
    error = math.sqrt(sum(each**2 for each in left) / (_WINDOWS - 2) / spread)
    return Trend(means[0], means[-1], line.slope, line.slope - _T_95 * error, line.slope + _T_95 * error)


def look(system: LocalSystem, began: float) -> Sample:
    """At all processes of the system and at the files that it writes."""
    state = read_state(system.settings.state_path)
    assert state is not None
    memory: dict[str, float] = {"supervisor": private_mib(state.pid)}
    for pid, line in descendants(state.pid):
        with suppress(OSError):
            memory[_kind(line)] = memory.get(_kind(line), 0.0) + private_mib(pid)
    folder = system.settings.state_path
    files = {each.name: _held(each) for each in sorted(folder.iterdir()) if each.is_dir()}
    return Sample(time.monotonic() - began, memory, files)


def _kind(line: str) -> str:
    """What a process is, from its command line."""
    if line.startswith("ray::"):
        return line.split()[0].removeprefix("ray::").partition(".")[0]  # without the method that it is in
    words = line.split()
    modules = [after for word, after in itertools.pairwise(words) if word == "-m"]
    name = modules[0] if modules else next((word for word in words if not word.startswith("-")), "")
    script = next((word for word in words[1:3] if word.endswith(".py")), "")
    return Path(script or name).name


def _held(folder: Path) -> tuple[int, float]:
    count, size = 0, 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            if file.is_file() and not file.is_symlink():
                count, size = count + 1, size + file.stat().st_blocks * 512
    return count, size / 2**20


@dataclass
class Soak:
    """What was seen."""

    samples: list[Sample] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    began: float = 0.0

    def trends(self, warm_up_s: float) -> Iterator[tuple[str, Trend]]:
        """Of each process in MiB, of each folder in MiB and in files, of the questions in milliseconds."""
        samples = [sample for sample in self.samples if sample.at_s >= warm_up_s]
        times = [sample.at_s for sample in samples]
        for name in sorted({name for sample in samples for name in sample.memory_mib}):
            yield f"{name}, MiB", trend(times, [sample.memory_mib.get(name, 0.0) for sample in samples])
        for name in sorted({name for sample in samples for name in sample.files}):
            held = [sample.files.get(name, (0, 0.0)) for sample in samples]
            yield f"{name}/, files", trend(times, [float(count) for count, _ in held])
            yield f"{name}/, MiB", trend(times, [size for _, size in held])
        asked = [each for each in self.requests if each.kind == "question" and each.started - self.began >= warm_up_s]
        asked.sort(key=lambda each: each.started)
        yield (
            "a question, ms",
            trend([each.started - self.began for each in asked], [1000 * each.seconds for each in asked]),
        )


async def soak(system: LocalSystem, *, minutes: float, per_second: float, seed: int, sample_s: float) -> Soak:
    """Load for so long, a look each ``sample_s`` seconds."""
    async with BlockragClient(system.target, timeout_s=60) as client:
        load = Load(client, per_second, seed)
        await load.prepare()
        found = Soak(requests=load.done, began=time.monotonic())
        stop = asyncio.Event()
        running = asyncio.create_task(load.run(stop))
        while time.monotonic() - found.began < 60 * minutes:
            found.samples.append(await asyncio.to_thread(look, system, found.began))
            await asyncio.sleep(sample_s)
        stop.set()
        await running
    return found


async def never_seen(system: LocalSystem, questions: int, each: int) -> list[tuple[float, float]]:
    """Questions whose passages are new, all of them; after each ``each`` of them one whose passages are cached.

    Returns for each span the median time to the first token in ms of the new ones, and the cached ones' (of three).
    """
    rows = []
    async with BlockragClient(system.target, timeout_s=60) as client:
        fresh: list[float] = []
        for number in range(questions):
            name = f"Place{number:05}"
            await client.ingest_text(name, f"The capital of {name} is Town{number}.", title=name, collection="new")
            answer = await client.ask(f"What is the capital of {name}?", collection="new", top_k=1, max_tokens=2)
            fresh.append(answer.completion.time_to_first_token_ms)
            if len(fresh) == each:
                known = f"What is the capital of {next(iter(FACTS))}?"
                warm = [await client.ask(known, collection=COLLECTION, top_k=3, max_tokens=2) for _ in range(4)]
                times = [answer.completion.time_to_first_token_ms for answer in warm[1:]]
                rows.append((statistics.median(fresh), statistics.median(times)))
                fresh = []
        await client.delete_collection("new")
    return rows


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes at the beginning that do not count")
    parser.add_argument("--per-second", type=float, default=2.0)
    parser.add_argument("--new", type=int, default=1000, help="questions about new passages afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", default="", help="empty: the reader that ships")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalSystem.start(fault_settings(Path(folder) / "state", options.bundle), owned=True) as system,
    ):
        found = asyncio.run(
            soak(
                system,
                minutes=options.minutes,
                per_second=options.per_second,
                seed=options.seed,
                sample_s=options.minutes / 4,
            )
        )
        bad = [each for each in found.requests if each.error or each.wrong]
        print(json.dumps({"requests": len(found.requests), "failed or wrong": len(bad)}), flush=True)
        for each in bad[:20]:
            print(each.kind, round(each.seconds, 1), each.error or each.wrong)
        for name, line in found.trends(60 * options.warm_up):
            interval = f"{line.low:+.2f} to {line.high:+.2f}"
            print(f"{name}: {line.first:.1f} to {line.last:.1f}, {line.per_hour:+.2f} an hour ({interval})", flush=True)
        if options.new:
            for fresh, warm in asyncio.run(never_seen(system, options.new, max(1, options.new // 10))):
                print(f"new {fresh:.1f} ms, cached {warm:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
