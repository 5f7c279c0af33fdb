"""What HTTP adds to the time to first token, and what a conversation's fifth turn waits for.

``python -m load_tests.doors --questions 40 --users 1 16``. Without ``--target`` it starts the whole system on this
machine. It ingests and warms a collection, asks every question over gRPC and over HTTP in turn, both streaming, and
prints a table and a JSON object. The same program sends both; ``beyond`` is what its clock saw less what the gateway's
did, so the model is not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import aiohttp

from blockrag.client import BlockragClient
from blockrag.corpus.sample import load_articles, load_questions
from blockrag.errors import BlockragError
from blockrag.evaluation.ttft_grpc import first_token_ms
from blockrag.local import LocalSystem
from blockrag.settings import load_settings
from load_tests.run import fresh_settings

Door = Literal["grpc", "http"]
COLLECTION = "doors"
_TURNS = 5
_READING_S = 1.0
"""Between an answer and the next question: somebody reads."""


@dataclass(frozen=True)
class Sample:
    """One answer's first text, in milliseconds."""

    door: Door
    seen: float
    """By the client, from sending the question."""
    served: float
    """By the gateway, from receiving it."""


@dataclass(frozen=True)
class Doors:
    """Both ways into one system."""

    grpc: BlockragClient
    http: aiohttp.ClientSession
    url: str
    tokens: int
    """Of each answer."""

    async def ask(self, door: Door, question: str) -> Sample:
        """One question, read to its end."""
        return await (self._over_grpc(question) if door == "grpc" else self._over_http(question))

    async def _over_grpc(self, question: str) -> Sample:
        answer = await self.grpc.ask(question, collection=COLLECTION, max_tokens=self.tokens)
        return Sample("grpc", first_token_ms(answer), answer.completion.time_to_first_token_ms)

    async def _over_http(self, question: str) -> Sample:
        body = _body([{"role": "user", "content": question}], self.tokens)
        seen, details, _ = await stream(self.http, self.url, body)
        return Sample("http", seen, details["time_to_first_token_ms"])


async def stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, dict[str, Any], str]:
    """Milliseconds to the first text, the answer's ``blockrag``, its text."""
    sent, first, text, details = time.perf_counter(), 0.0, "", {}
    async with http.post(f"{url}/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.perf_counter()
            chunk = json.loads(line[6:])
            text += chunk["choices"][0]["delta"].get("content", "")
            details = chunk.get("blockrag", details)
    return 1000 * (first - sent), details, text


def _body(messages: Sequence[dict[str, str]], tokens: int) -> dict[str, Any]:
    return {"model": f"blockrag/{COLLECTION}", "messages": messages, "max_tokens": tokens, "stream": True}


async def compare(doors: Doors, questions: Sequence[str], users: int, seed: int) -> list[Sample]:
    """Every question through both doors, one after the other in random order; ``users`` do so at the same time."""
    left = iter(questions)

    async def user(draw: random.Random) -> list[Sample]:
        samples = []
        for question in left:
            order: list[Door] = ["grpc", "http"]
            draw.shuffle(order)
            samples += [await doors.ask(door, question) for door in order]
        return samples

    found = await asyncio.gather(*(user(random.Random(seed + place)) for place in range(users)))
    return [sample for samples in found for sample in samples]


async def converse(doors: Doors, questions: Sequence[str]) -> list[dict[str, float]]:
    """A conversation, turn by turn: milliseconds to its first text, and tokens of its prompt."""
    messages: list[dict[str, str]] = []
    turns = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        seen, details, text = await stream(doors.http, doors.url, _body(messages, 32))
        usage = details["usage"]
        turns.append(
            {
                "first_ms": seen,
                "prompt_tokens": usage["prompt_tokens"],
                "encoded_tokens": usage["encoded_tokens"],
                "prefill_tokens": usage["prefill_tokens"],
            }
        )
        messages.append({"role": "assistant", "content": text or "."})
        await asyncio.sleep(_READING_S)
    return turns


async def measure(target: str, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, of the system at ``target`` (gRPC) and ``url`` (HTTP)."""
    questions = [question.question for question in load_questions()]
    random.Random(options.seed).shuffle(questions)
    async with BlockragClient(target) as grpc, aiohttp.ClientSession() as http:
        await grpc.wait_until_ready()
        for article in load_articles()[: options.articles]:
            await grpc.ingest_text(article.id, article.text, collection=COLLECTION, title=article.title)
        async for _ in grpc.warm(collection=COLLECTION):
            pass
        doors = Doors(grpc, http, url, options.tokens)
        await compare(doors, questions[:10], 2, options.seed)  # both are awake now
        rounds = {}
        for users in options.users:
            asked = questions[: max(options.questions, 4 * users)]
            rounds[users] = _summary(await compare(doors, asked, users, options.seed))
        talks = [
            await converse(doors, questions[place : place + _TURNS])
            for place in range(0, _TURNS * options.talks, _TURNS)
        ]
    turns = [{name: median(talk[turn][name] for talk in talks) for name in talks[0][0]} for turn in range(_TURNS)]
    return {"load_average": os.getloadavg(), "users": rounds, "turns": turns, "talks": options.talks}


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    doors: dict[str, Any] = {}
    for door in ("grpc", "http"):
        own = [sample for sample in samples if sample.door == door]
        doors[door] = {
            "answers": len(own),
            "first_ms": round(median(sample.seen for sample in own), 2),
            "beyond_ms": round(median(sample.seen - sample.served for sample in own), 2),
        }
    pairs = zip(samples[::2], samples[1::2], strict=True)
    differences = [(second.seen - first.seen) * (1 if second.door == "http" else -1) for first, second in pairs]
    added = doors["http"]["beyond_ms"] - doors["grpc"]["beyond_ms"]
    return {**doors, "added_ms": round(added, 2), "paired_ms": round(median(differences), 2)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; prints a table and a JSON object."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.doors", description=__doc__)
    parser.add_argument("--questions", type=int, default=40, help="asked through each door, at least four a user")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 16], help="how many ask at the same time")
    parser.add_argument("--tokens", type=int, default=8, help="most tokens of an answer")
    parser.add_argument("--articles", type=int, default=20, help="how many are ingested and warmed")
    parser.add_argument("--talks", type=int, default=5, help="conversations of five turns")
    parser.add_argument("--seed", type=int, default=0, help="the same seed asks the same questions")
    parser.add_argument("--settings", type=Path, default=None, help="settings of the system that is started")
    parser.add_argument("--target", default="", help="host:port of a running system's gRPC, to use that one")
    parser.add_argument("--http", default="http://127.0.0.1:8000/v1", help="its HTTP address")
    options = parser.parse_args(arguments)
    if options.target:
        found = asyncio.run(measure(options.target, options.http, options))
    else:
        settings = fresh_settings(load_settings(options.settings), Path("out/doors/state"))
        with LocalSystem.start(settings, owned=True) as system:
            found = asyncio.run(measure(system.target, system.http_url, options))
    for users, summary in found["users"].items():
        for door in ("grpc", "http"):
            row = summary[door]
            print(f"{users:3} users  {door}  first text {row['first_ms']:8.1f} ms, beyond {row['beyond_ms']:6.2f} ms")
        print(f"{users:3} users  HTTP adds {summary['added_ms']:.2f} ms (paired {summary['paired_ms']:.2f})")
    for place, turn in enumerate(found["turns"], start=1):
        print(f"turn {place}  first text {turn['first_ms']:8.1f} ms of {turn['prompt_tokens']:.0f} prompt tokens")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BlockragError as problem:
        sys.exit(f"doors: {problem}")
