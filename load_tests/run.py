"""A load test from start to end: ``python -m load_tests.run --seconds 60 --users 4 --out out/load``.

Without ``--target`` it starts the whole system on this machine, ingests and warms the sample corpus, lets the users
ask, and stops what it started. Its exit code is the gate's: 0 when the service level was kept. OUT gets report.html,
load_*.csv and summary.json. What follows ``--`` goes to Locust: ``-- --p95-first-token-ms 200 --think-s 0.2``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blockrag.cli.measured import own_settings
from blockrag.client import BlockragClient
from blockrag.corpus.sample import Article, load_articles, load_questions
from blockrag.errors import BlockragError
from blockrag.local import LocalSystem
from blockrag.settings import Settings, load_settings
from load_tests.mix import Mix

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
COLLECTION = "almanac"
_INGEST_AT_A_TIME = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the load test; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, locust_options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = _parser().parse_args(own)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.target:
        return _ask(options.target, options, locust_options)

    settings = fresh_settings(load_settings(options.settings), options.out / "state")
    with LocalSystem.start(settings, on_progress=_say, owned=True) as system:
        key = settings.gateway.tenants[0].api_key if settings.gateway.tenants else ""
        asyncio.run(_prepare(system.target, key, options.seed, options.hot_articles))
        return _ask(system.target, options, locust_options, key)


def locust_command(target: str, folder: Path, users: int, seconds: int, options: Sequence[str]) -> list[str]:
    """Locust without its web page, reporting into ``folder``."""
    fixed = {
        "--locustfile": LOCUSTFILE,
        "--host": target,
        "--users": users,
        "--spawn-rate": users,
        "--run-time": f"{seconds}s",
        "--stop-timeout": "30s",
        "--csv": folder / "load",
        "--html": folder / "report.html",
        "--summary": folder / "summary.json",
    }
    flags = [word for flag, value in fixed.items() for word in (flag, str(value))]
    return [sys.executable, "-m", "locust", "--headless", "--only-summary", *flags, *options]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.run", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="how long the users ask")
    parser.add_argument("--users", type=int, default=4, help="how many ask at the same time")
    parser.add_argument("--out", type=Path, default=Path("out/load"), help="folder for the reports")
    parser.add_argument("--target", default="", help="host:port of a running system that holds the collection")
    parser.add_argument("--seed", type=int, default=0, help="the same seed asks the same questions")
    parser.add_argument("--hot-articles", type=int, default=10, help="how many of the hottest articles are warmed")
    parser.add_argument("--settings", type=Path, default=None, help="settings of the system that is started")
    return parser


def _ask(target: str, options: argparse.Namespace, locust_options: Sequence[str], api_key: str = "") -> int:
    locust_options = ["--seed", str(options.seed), "--collection", COLLECTION, *locust_options]
    command = locust_command(target, options.out, options.users, options.seconds, locust_options)
    # In the environment and not among the arguments, which everybody on the machine can read.
    environment = {**os.environ, **({"LOAD_TEST_API_KEY": api_key} if api_key else {})}
    code = subprocess.run(command, check=False, env=environment).returncode
    _say(f"reports: {options.out / 'report.html'}, {options.out / 'summary.json'}")
    return code


def fresh_settings(settings: Settings, state: Path) -> Settings:
    """``own_settings`` with an empty state directory."""
    shutil.rmtree(state, ignore_errors=True)
    return own_settings(settings, state)


async def _prepare(target: str, api_key: str, seed: int, hot: int) -> None:
    """Ingests the sample corpus and encodes the blocks of its hot articles ahead of time; the others stay cold."""
    articles = load_articles()
    async with BlockragClient(target, api_key=api_key or None) as client:
        await client.wait_until_ready()
        limit = asyncio.Semaphore(_INGEST_AT_A_TIME)

        async def ingest(article: Article) -> None:
            async with limit:
                await client.ingest_text(
                    article.id, article.text, collection=COLLECTION, title=article.title, media_type="text/markdown"
                )

        await asyncio.gather(*map(ingest, articles))
        _say(f"ingested {len(articles)} articles")
        hottest = Mix(tuple(load_questions()), seed).articles()[:hot]
        if hottest:
            async for progress in client.warm(collection=COLLECTION, document_ids=hottest):
                last = progress
            _say(f"warmed {last.done} passages of {len(hottest)} hot articles")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BlockragError as problem:
        sys.exit(f"load test: {problem}")
