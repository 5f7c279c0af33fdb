"""Locust's users against a real gRPC server, in a process of their own: Locust patches the standard library."""

from __future__ import annotations

import asyncio
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockrag.corpus.sample import load_questions
from blockrag.v1 import common_pb2
from load_tests.run import locust_command
from tests.unit.load_tests.server import FakeRag, serve

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Run:
    """What a Locust process left."""

    code: int
    log: str
    folder: Path

    @property
    def entries(self) -> dict[str, dict[str, str]]:
        with (self.folder / "load_stats.csv").open(encoding="utf-8") as file:
            return {row["Name"]: row for row in csv.DictReader(file)}

    @property
    def summary(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return loaded


async def load(rag: FakeRag, folder: Path, *options: str, users: int = 2, seconds: int = 2) -> Run:
    command = locust_command(rag.target, folder, users=users, seconds=seconds, options=["--think-s", "0.05", *options])
    process = await asyncio.create_subprocess_exec(
        *command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode is not None
    return Run(process.returncode, output.decode(), folder)


async def test_a_run_within_the_service_level_passes_and_reports(tmp_path: Path) -> None:
    async with serve(FakeRag(delay_s=0.01)) as rag:
        run = await load(rag, tmp_path, "--mode-weights", "block=1,full=1", "--api-key", "0123456789abcdef")

    assert run.code == 0, run.log
    answers = {name: int(row["Request Count"]) for name, row in run.entries.items()}
    assert answers["whole answer (block)"] > 0
    assert answers["whole answer (full)"] > 0
    assert answers["first token (block)"] == answers["whole answer (block)"]
    assert float(run.entries["first token (block)"]["Average Response Time"]) >= 10
    counted = answers["whole answer (block)"] + answers["whole answer (full)"]
    # The end of the run may cut off a user who has only just asked.
    assert len(rag.requests) - 2 <= counted <= len(rag.requests)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()
    assert run.summary["kept"] is True
    assert run.summary["prompt_tokens"] == {
        "l1_tokens": 30 * counted,
        "store_tokens": 0,
        "disk_tokens": 0,
        "encoded_tokens": 0,
        "prefill_tokens": 12 * counted,
    }


async def test_requests_are_real_questions_of_the_corpus(tmp_path: Path) -> None:
    async with serve(FakeRag()) as rag:
        await load(rag, tmp_path, "--api-key", "0123456789abcdef", "--top-k", "3", "--collection", "atlas", seconds=1)

    questions = {question.question for question in load_questions()}
    assert {request.question for request in rag.requests} <= questions
    assert {request.collection for request in rag.requests} == {"atlas"}
    assert {request.top_k for request in rag.requests} == {3}
    assert common_pb2.ATTENTION_MODE_BLOCK in {request.attention_mode for request in rag.requests}
    for metadata in rag.metadata:
        assert metadata["application"] == "gateway"
        assert metadata["authorization"] == "Bearer 0123456789abcdef"
    assert len(rag.peers) == 2, "each user has a connection of its own"


async def test_the_same_seed_asks_the_same(tmp_path: Path) -> None:
    asked = []
    for seed in ("7", "7"):
        async with serve(FakeRag()) as rag:
            await load(rag, tmp_path, "--seed", seed, users=1, seconds=1)
        asked.append([(request.question, request.attention_mode) for request in rag.requests[:5]])

    assert len(asked[0]) == 5
    assert asked[0] == asked[1]


async def test_slow_first_tokens_fail_the_run(tmp_path: Path) -> None:
    async with serve(FakeRag(delay_s=0.2)) as rag:
        run = await load(rag, tmp_path, "--p95-first-token-ms", "100", "--least-answers", "1")

    assert run.code == 1
    assert "p95 of the first token" in run.log
    assert run.summary["kept"] is False
    assert run.summary["verdict"]["failures"] == 0


async def test_failed_answers_fail_the_run(tmp_path: Path) -> None:
    async with serve(FakeRag(fail_every=2)) as rag:
        run = await load(rag, tmp_path)

    assert run.code == 1
    assert "answers failed" in run.log
    failures = (tmp_path / "load_failures.csv").read_text(encoding="utf-8")
    assert "UNAVAILABLE: no decoder" in failures


async def test_a_few_failures_are_within_the_service_level(tmp_path: Path) -> None:
    async with serve(FakeRag(fail_every=4)) as rag:
        run = await load(rag, tmp_path, "--failure-ratio", "0.5")

    assert run.code == 0, run.log
    assert run.summary["verdict"]["failures"] > 0


async def test_a_stream_without_completion_is_a_failure(tmp_path: Path) -> None:
    async with serve(FakeRag(break_off=True)) as rag:
        run = await load(rag, tmp_path, seconds=1)

    assert run.code == 1
    assert run.summary["verdict"]["failures"] == run.summary["verdict"]["answers"] > 0


async def test_nobody_answers(tmp_path: Path) -> None:
    run = await load(FakeRag(target="127.0.0.1:1"), tmp_path, seconds=1)

    assert run.code == 1
    assert run.summary["verdict"]["p95_first_token_ms"] is None
    assert "UNAVAILABLE" in (tmp_path / "load_failures.csv").read_text(encoding="utf-8")


async def test_wrong_weights_are_refused_at_once(tmp_path: Path) -> None:
    run = await load(FakeRag(target="127.0.0.1:1"), tmp_path, "--mode-weights", "paged=1", seconds=1)

    assert run.code != 0
    assert "no attention mode" in run.log


def test_the_command_runs_this_python(tmp_path: Path) -> None:
    command = locust_command("127.0.0.1:9000", tmp_path, users=4, seconds=60, options=[])

    assert command[:3] == [sys.executable, "-m", "locust"]
    assert command[command.index("--host") + 1] == "127.0.0.1:9000"


pytestmark = pytest.mark.timeout(180)
