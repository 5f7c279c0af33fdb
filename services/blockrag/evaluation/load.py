"""A running system under open-loop load: questions come when they come, however long the answers take.

The questions are those of a simulated scenario, with passages of the sample corpus in the place of its numbers, so that
what is measured and what ``blockrag.simulation`` predicts can stand side by side.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from blockrag.client import BlockragClient
from blockrag.errors import BlockragError, OverloadedError
from blockrag.evaluation.ttft_grpc import QUESTION, first_token_ms
from blockrag.results import GenerateOptions, GivenPassage, Usage
from blockrag.simulation.cluster import simulate
from blockrag.simulation.scenario import Scenario, StageTimes, percentile
from blockrag.simulation.workload import Asked, Workload

LoadMode = Literal["block", "full"]


@dataclass(frozen=True)
class LoadRow:
    """One rate in one mode. Times in seconds, counted from when a question was due."""

    rate: float
    mode: LoadMode
    asked: int
    failed: int
    refused: int
    """Of those that failed, told to come again later."""
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    goodput: float
    """Answers a second whose first token came within the target."""
    answer_tokens: float
    """Mean."""
    shares: dict[str, float]
    """Of the passages' tokens: from the decoder's memory (l1), the object store, disk, or encoded (full: computed)."""
    predicted_p50: float
    predicted_p95: float
    predicted_held: float
    """Share that the simulation finds in some tier."""

    @property
    def held(self) -> float:
        """Share of the passages' tokens that were found in some tier."""
        return 1 - self.shares["encoded"]


@dataclass(frozen=True)
class _Heard:
    ttft_s: float
    usage: Usage | None
    refused: bool = False


async def measure_load(
    client: BlockragClient,
    scenario: Scenario,
    passages: Sequence[GivenPassage],
    rates: Sequence[float],
    modes: Sequence[LoadMode],
    times: StageTimes,
    *,
    target_s: float,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[LoadRow]:
    """Rows of each rate and mode, one after the other; ``passages`` are at least the scenario's.

    A fifth as many questions warm the caches before each row and are not counted.
    """
    rows: list[LoadRow] = []
    count = scenario.questions + scenario.questions // 5
    total, done = count * len(rates) * len(modes), 0

    def heard_one() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    for rate in rates:
        for mode in modes:
            asked = replace(scenario, rate=rate)
            started = time.perf_counter()
            heard = await _ask_all(client, asked, passages, mode, heard_one)
            heard = heard[scenario.questions // 5 :]
            rows.append(_row(asked, mode, heard, times, target_s, time.perf_counter() - started))
    return rows


async def _ask_all(
    client: BlockragClient,
    scenario: Scenario,
    passages: Sequence[GivenPassage],
    mode: LoadMode,
    on_answer: Callable[[], None],
) -> list[_Heard]:
    start = time.perf_counter()

    async def ask(asked: Asked) -> _Heard:
        await asyncio.sleep(max(0.0, start + asked.at - time.perf_counter()))
        given = tuple(passages[place] for place in asked.passages)
        options = GenerateOptions(attention_mode=mode, max_tokens=scenario.answer_tokens, passages=given)
        waited = time.perf_counter() - start - asked.at
        try:
            answer = await client.ask(QUESTION, **options)
            return _Heard(waited + first_token_ms(answer) / 1000, answer.completion.usage)
        except BlockragError as error:
            return _Heard(0.0, None, refused=isinstance(error, OverloadedError))
        finally:
            on_answer()

    count = scenario.questions + scenario.questions // 5
    return list(await asyncio.gather(*(ask(asked) for asked in Workload(scenario).questions(count))))


def _row(
    scenario: Scenario, mode: LoadMode, heard: Sequence[_Heard], times: StageTimes, target_s: float, took_s: float
) -> LoadRow:
    usages = [each.usage for each in heard if each.usage is not None]
    firsts = [each.ttft_s for each in heard if each.usage is not None]
    counted = {tier: sum(getattr(usage, f"{tier}_tokens") for usage in usages) for tier in ("l1", "store", "disk")}
    context = sum(usage.context_tokens for usage in usages) or 1
    tokens = statistics.fmean(usage.completion_tokens for usage in usages) if usages else 0.0
    encoded = sum(usage.encoded_tokens for usage in usages) if mode == "block" else context
    found = sum(counted.values()) or 1
    held = max(0.0, 1 - encoded / context)
    same = replace(scenario, answer_tokens=max(1, round(tokens)), caching="block" if mode == "block" else "none")
    predicted = simulate(same, times)
    return LoadRow(
        rate=scenario.rate,
        mode=mode,
        asked=len(heard),
        failed=sum(each.usage is None for each in heard),
        refused=sum(each.refused for each in heard),
        ttft_p50=percentile(firsts, 0.5),
        ttft_p95=percentile(firsts, 0.95),
        ttft_p99=percentile(firsts, 0.99),
        goodput=sum(first <= target_s for first in firsts) / max(took_s * 5 / 6, 1e-9),
        answer_tokens=round(tokens, 2),
        shares={**{tier: held * counted[tier] / found for tier in counted}, "encoded": 1 - held},
        predicted_p50=predicted.ttft_p50,
        predicted_p95=predicted.ttft_p95,
        predicted_held=1 - predicted.shares["encoded"],
    )
