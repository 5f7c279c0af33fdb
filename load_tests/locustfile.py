"""Locust users that ask questions over gRPC.

Alone: ``locust -f load_tests/locustfile.py --headless --host 127.0.0.1:9000 -u 4 -t 60s``. ``load_tests.run`` does it
with a system started for the purpose.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import grpc
import grpc.experimental.gevent as grpc_gevent
import locust.stats
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from blockrag.corpus.sample import load_questions
from blockrag.v1 import common_pb2, rag_pb2, rag_pb2_grpc
from load_tests.gate import METHOD, ServiceLevel, first_token, judge, whole_answer
from load_tests.mix import Mix, parse_weights

# Before the first channel: a call then lets other users run while it waits.
grpc_gevent.init_gevent()

_LOGGER = logging.getLogger("blockrag.load")
_MODES = {
    "block": common_pb2.ATTENTION_MODE_BLOCK,
    "full": common_pb2.ATTENTION_MODE_FULL,
    "none": common_pb2.ATTENTION_MODE_NONE,
}
_TIERS = ("l1_tokens", "store_tokens", "disk_tokens", "encoded_tokens", "prefill_tokens")


class AnswerError(Exception):
    """An answer that failed; the message groups equal failures in the report."""


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0, help="the same seed asks the same questions")
    add("--collection", default="almanac", help="collection to ask")
    add("--top-k", type=int, default=5, help="passages to retrieve")
    add("--api-key", default="", env_var="LOAD_TEST_API_KEY", is_secret=True, help="bearer token of the tenant")
    add("--deadline-s", type=float, default=30.0, help="deadline of a call")
    add("--think-s", type=float, default=1.0, help="mean thinking time of a user")
    add("--zipf", type=float, default=1.1, help="how hot the hot articles are; 0: all alike")
    add("--mode-weights", type=_weights, default="block=8,full=1,none=1", help="how often each attention mode is used")
    add(
        "--p95-first-token-ms",
        type=float,
        default=ServiceLevel.p95_first_token_ms,
        help="gate: p95 of the first token in block mode",
    )
    add("--failure-ratio", type=float, default=ServiceLevel.failure_ratio, help="gate: most answers that may fail")
    add("--least-answers", type=int, default=ServiceLevel.least_answers, help="gate: fewest answers that say anything")
    add("--summary", default="", help="file for the verdict and token counts, as JSON")


def _weights(text: str) -> dict[str, float]:
    try:
        return parse_weights(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    QuestionUser.mix = Mix(
        questions=tuple(load_questions()),
        seed=options.seed,
        exponent=options.zipf,
        mode_weights=options.mode_weights,
        think_s=options.think_s,
    )
    QuestionUser.numbers = itertools.count()
    QuestionUser.tokens = Counter()


class QuestionUser(User):
    """Thinks, asks, reads the answer as it streams."""

    mix: Mix
    numbers: itertools.count[int]
    tokens: Counter[str]
    """Prompt tokens of all users by where their attention state came from."""

    def on_start(self) -> None:
        options = self.environment.parsed_options
        # A pool of its own gives each user a connection, as separate clients have.
        self._channel = grpc.insecure_channel(
            self.host or "127.0.0.1:9000", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._stub = rag_pb2_grpc.RagServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = [("application", "gateway")]
        if options.api_key:
            self._metadata.append(("authorization", f"Bearer {options.api_key}"))
        self._questions = self.mix.of_user(next(self.numbers))
        self._next = next(self._questions)

    def on_stop(self) -> None:
        self._channel.close()

    def wait_time(self) -> float:
        """Thinking time before the next question."""
        return self._next.think_s

    @task
    def ask(self) -> None:
        asked, self._next = self._next, next(self._questions)
        options = self.environment.parsed_options
        request = rag_pb2.GenerateRequest(
            question=asked.question,
            collection=options.collection,
            top_k=options.top_k,
            attention_mode=_MODES[asked.mode],
        )
        started = time.perf_counter()
        received = 0
        problem: Exception | None = None
        completion: rag_pb2.Completion | None = None
        waiting = True
        try:
            for event in self._stub.Generate(request, timeout=options.deadline_s, metadata=self._metadata):
                received += event.ByteSize()
                if event.HasField("text") and waiting:
                    waiting = False
                    self._report(first_token(asked.mode), started, received, None)
                elif event.HasField("completion"):
                    completion = event.completion
            if completion is None:
                problem = AnswerError("the stream ended without a completion")
        except grpc.RpcError as error:
            problem = AnswerError(f"{error.code().name}: {error.details()}")
        self._report(whole_answer(asked.mode), started, received, problem)
        if completion is not None:
            self.tokens.update({tier: getattr(completion.usage, tier) for tier in _TIERS})

    def _report(self, name: str, started: float, length: int, problem: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type=METHOD,
            name=name,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=length,
            exception=problem,
            context={},
        )


@events.quitting.add_listener
def _decide(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    level = ServiceLevel(
        p95_first_token_ms=options.p95_first_token_ms,
        failure_ratio=options.failure_ratio,
        least_answers=options.least_answers,
    )
    crashes = len(environment.runner.exceptions) if environment.runner else 0
    verdict = judge(environment.stats, level, crashes)
    for problem in verdict.problems:
        _LOGGER.error("service level broken: %s", problem)
    # Set in both cases: Locust's own rule fails a run for a single failure.
    environment.process_exit_code = 0 if verdict.kept else 1
    if options.csv_prefix:
        # Locust writes its CSV files every so often and not at the end: wait for once more.
        gevent.sleep(locust.stats.CSV_STATS_INTERVAL_SEC + 0.1)
    if options.summary:
        summary = {
            "kept": verdict.kept,
            "verdict": dataclasses.asdict(verdict),
            "service_level": dataclasses.asdict(level),
            "prompt_tokens": dict(QuestionUser.tokens),
            "seed": options.seed,
            "mode_weights": options.mode_weights,
            "users": options.num_users,
            "seconds": options.run_time,
        }
        Path(options.summary).write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")
