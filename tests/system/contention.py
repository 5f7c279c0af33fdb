"""One tenant asks for ten times its share: what another one notices.

``python -m tests.system.contention`` starts a system of its own with two tenants and finds out how much it can answer.
Then, in turns, both ask for a quarter of that, and one of them for ten times as much. Open loops: a question is sent
when it is due, whatever has become of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from blockrag.client import BlockragClient
from blockrag.errors import BlockragError
from tests.system.foreign import KEYS, tenants_system

TIMES = 10
_COLLECTION = "contention"


@dataclass
class Answers:
    """What one tenant got in one phase."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def p95(self) -> float:
        """Of those that were answered."""
        ordered = sorted(self.seconds)
        return ordered[int(0.95 * len(ordered))] if ordered else float("nan")


class Asker:
    """One tenant's questions."""

    def __init__(self, target: str, tenant: str, tokens: int) -> None:
        self.client = BlockragClient(target, api_key=KEYS[tenant], patience_s=0.0)
        self._draw = random.Random(tenant)
        self._tokens = tokens

    async def prepare(self) -> None:
        """Stores a document."""
        await self.client.ingest_text("fact", "The capital of Norway is Oslo.", collection=_COLLECTION)

    async def one(self, answers: Answers) -> None:
        """Asks once."""
        started = time.perf_counter()
        try:
            await self.client.ask(
                "What is the capital of Norway?", collection=_COLLECTION, max_tokens=self._tokens, timeout_s=60
            )
        except BlockragError as error:
            answers.errors[type(error).__name__] += 1
        else:
            answers.seconds.append(time.perf_counter() - started)

    async def open_loop(self, rate: float, seconds: float, answers: Answers) -> None:
        """At so many questions a second, at random times."""
        until = time.perf_counter() + seconds
        due, tasks = time.perf_counter(), []
        while (due := due + self._draw.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one(answers)))
        await asyncio.gather(*tasks)


async def capacity(asker: Asker, seconds: float) -> float:
    """Answers a second with eight at a time."""
    answers = Answers()
    until = time.perf_counter() + seconds

    async def again() -> None:
        while time.perf_counter() < until:
            await asker.one(answers)

    await asyncio.gather(*(again() for _ in range(8)))
    return len(answers.seconds) / seconds


async def measure(target: str, *, phases: int, seconds: float, tokens: int) -> dict[str, object]:
    """Both alike and one in excess, in turns; what the other one's answers took."""
    quiet, greedy = Asker(target, "alice", tokens), Asker(target, "mallory", tokens)
    async with quiet.client, greedy.client:
        for asker in (quiet, greedy):
            await asker.prepare()
            await asker.one(Answers())
        share = await capacity(quiet, seconds / 2) / 4
        seen = {1: (Answers(), Answers()), TIMES: (Answers(), Answers())}
        for _ in range(phases):
            for times, (of_quiet, of_greedy) in seen.items():
                await asyncio.gather(
                    quiet.open_loop(share, seconds, of_quiet), greedy.open_loop(share * times, seconds, of_greedy)
                )
    alike, excess = seen[1][0].p95(), seen[TIMES][0].p95()
    return {
        "share_per_second": round(share, 2),
        "p95_s_alike": round(alike, 3),
        "p95_s_beside_excess": round(excess, 3),
        "ratio": round(excess / alike, 2),
        "answers": [len(each[0].seconds) for each in seen.values()],
        "errors": [dict(each[0].errors) for each in seen.values()],
        "greedy_answers": [len(each[1].seconds) for each in seen.values()],
        "greedy_errors": [dict(each[1].errors) for each in seen.values()],
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--phases", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--bundle", default="", help="empty: the reader that ships")
    options = parser.parse_args()
    with tenants_system(options.bundle) as system:
        found = asyncio.run(
            measure(system.target, phases=options.phases, seconds=options.seconds, tokens=options.tokens)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
