"""Times to first token as rows, and over gRPC, through every service, for each state that a prompt's blocks can be in.

Passages are given with the request, so retrieval is left out and contexts have the sizes that are asked for. Within
one repeat the states follow each other for the same passages; repeats are interleaved over the contexts, so that a
change of the machine's speed meets them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from blockrag.client import BlockragClient
from blockrag.corpus.sample import load_articles
from blockrag.errors import SettingsError
from blockrag.ingest.splitting import PassageSplitter
from blockrag.modeling.bundle import Bundle
from blockrag.results import Answer, Compression, GenerateOptions, GivenPassage

MeasuredPath = Literal["model", "grpc"]

LABELS = {
    "none": "no retrieval",
    "stock": "stock transformers",
    "full": "full attention",
    "block_cold": "block, cold",
    "block_copied": "block, warm: copied in",
    "block_store": "block, warm: object store",
    "block_l1": "block, warm: decoder memory",
    "compressed_copied": "compressed, warm: copied in",
    "compressed_l1": "compressed, warm: decoder memory",
    "rate_4": "mixed at rate 4: decoder memory",
    "rate_8": "mixed at rate 8: decoder memory",
    "rate_16": "mixed at rate 16: decoder memory",
}
"""By state: the question alone; stock transformers, full prefill with a KV cache; our full mode; block mode with the
blocks encoded first; with blocks that are copied in, as those of an object store once they are mapped; with those of a
store; with resident blocks; every chunk compressed, copied in and resident; a mixture of expanded and compressed chunks
with so many tokens per slot, both forms resident."""
RATES = {"rate_4": 4, "rate_8": 8, "rate_16": 16}
_ELSEWHERE = {"model": ("block_store",), "grpc": ("stock", "block_copied", "compressed_copied")}


def states_of(path: MeasuredPath, chunk_tokens: int | None) -> tuple[str, ...]:
    """The states that can be measured with chunks of so many tokens: a mixture's rate is below theirs.

    ``chunk_tokens`` is None where nothing can be compressed.
    """
    states = [state for state in LABELS if state not in _ELSEWHERE[path]]
    if chunk_tokens is None:
        return tuple(state for state in states if not state.startswith("compressed") and state not in RATES)
    return tuple(state for state in states if RATES.get(state, 0) < chunk_tokens)


@dataclass(frozen=True)
class ReportRow:
    """Times of one state at one context size, in milliseconds."""

    path: MeasuredPath
    """model: inside one process; grpc: from the client through every service."""
    state: str
    """A key of ``LABELS``."""
    context_tokens: int
    min_ms: float
    median_ms: float
    max_ms: float
    repeats: int
    ratio_to_none: float | None
    """Median of the ratios to the same repeat's time without retrieval; None where that was not measured."""
    slots: int | None = None
    """Slots of the passages in the prompt, where they were counted."""
    kv_bytes: int | None = None
    """K and V moved from a cache to the prompt."""


def make_row(
    path: MeasuredPath,
    state: str,
    context_tokens: int,
    times: Sequence[float],
    none: Sequence[float] | None,
    slots: int | None = None,
    kv_bytes: int | None = None,
) -> ReportRow:
    """A row of interleaved times: ``times[i]`` and ``none[i]`` were measured one after the other."""
    ratio = None
    if none is not None:
        ratio = round(statistics.median(time / base for time, base in zip(times, none, strict=True)), 3)
    return ReportRow(
        path=path,
        state=state,
        context_tokens=context_tokens,
        min_ms=round(min(times), 3),
        median_ms=round(statistics.median(times), 3),
        max_ms=round(max(times), 3),
        repeats=len(times),
        ratio_to_none=ratio,
        slots=slots,
        kv_bytes=kv_bytes,
    )


def rate_notes(chunk_tokens: int) -> list[str]:
    """What chunks of so many tokens make of the rates that have no row."""
    notes = []
    for rate in RATES.values():
        if rate == chunk_tokens:
            notes.append(f"rate {rate} is everything compressed")
        elif rate > chunk_tokens:
            notes.append(f"rate {rate} is not reachable")
    return [f"with chunks of {chunk_tokens} tokens, {', '.join(notes)}"] if notes else []


@dataclass(frozen=True)
class GrpcSample:
    """One answer's first token."""

    state: str
    context_tokens: int
    """Passage tokens asked for."""
    slots: int
    """Slots of the passages: what the prompt has less the instruction and the final block."""
    client_ms: float
    """Sending the request to receiving the first text, in the client."""
    stages_ms: dict[str, float]


@dataclass(frozen=True)
class Workload:
    """What is asked."""

    question: str
    contexts: dict[int, tuple[GivenPassage, ...]]
    """Context size in tokens to passages."""
    displacing: tuple[GivenPassage, ...]
    """Passages that together fill the decoder's own memory, so that others are read from the object store again."""


async def measure_grpc_ttft(
    client: BlockragClient,
    workload: Workload,
    *,
    chunk_tokens: int | None = None,
    repeats: int = 20,
    warmup: int = 2,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[GrpcSample]:
    """Samples of every context and state; ``warmup`` repeats are run and not kept.

    ``chunk_tokens``: of the served bundle, where it compresses; with mixtures, the policy's choice is part of the time.
    """
    states = states_of("grpc", chunk_tokens)
    samples: list[GrpcSample] = []
    total = (repeats + warmup) * len(workload.contexts)
    done = alone = 0
    for repeat in range(-warmup, repeats):
        for context_tokens, passages in workload.contexts.items():
            for state in states:
                answer = await _ask(client, workload, passages, state, chunk_tokens)
                if state == "none":
                    alone = answer.completion.usage.prompt_tokens
                if repeat >= 0:
                    answered = answer.completion
                    slots = answered.usage.prompt_tokens - alone
                    stages = dict(answered.stages_ms)
                    samples.append(GrpcSample(state, context_tokens, slots, first_token_ms(answer), stages))
            done += 1
            on_progress(done, total)
    return samples


async def _ask(
    client: BlockragClient,
    workload: Workload,
    passages: tuple[GivenPassage, ...],
    state: str,
    chunk_tokens: int | None,
) -> Answer:
    def ask(
        given: tuple[GivenPassage, ...], mode: Literal["block", "full", "none"] = "block", rate: float | None = None
    ) -> Coroutine[Any, Any, Answer]:
        options = GenerateOptions(attention_mode=mode, max_tokens=2, passages=given)
        if rate is not None:
            options["compression"] = Compression(rate=rate)
        return client.ask(workload.question, **options)

    if state == "none":
        return await ask((), "none")
    if state == "full":
        return await ask(passages, "full")
    if state == "block_cold":
        # A beginning that was never used makes blocks that nobody has encoded, of nearly as many tokens.
        stamp = f"{time.time_ns() % 10**9}"
        fresh = tuple(GivenPassage(stamp + passage.text[len(stamp) :], passage.title) for passage in passages)
        return await ask(fresh)
    if state == "block_store":
        # Asked once so that the store has them, then displaced from the decoder's own memory.
        await ask(passages)
        await ask(workload.displacing)
        return await ask(passages)
    rate = chunk_tokens if state == "compressed_l1" else RATES.get(state)
    await ask(passages, rate=rate)
    return await ask(passages, rate=rate)


def first_token_ms(answer: Answer) -> float:
    """From sending the request to receiving the first text, in the client.

    An answer may be empty text: then it is the gateway's time, plus nothing that a client sees.
    """
    return answer.client_time_to_first_token_ms or answer.completion.time_to_first_token_ms


QUESTION = (
    "Considering all of the countries that are described in the passages above, and leaving aside those for which "
    "no figure is given at all, what is the name of the capital of the country that has the largest population, "
    "and when did it become independent?"
)
"""About 50 tokens with the bundled reader's vocabulary."""


def make_workload(bundle: Bundle, contexts: Sequence[int]) -> Workload:
    """Passages of the bundle's size for each number of tokens, and as many others to displace them.

    No passage stands in two contexts. Raises ``SettingsError`` when the sample corpus is too small for them.
    """
    passages = _passages(bundle)
    sized = {tokens: _take(passages, tokens) for tokens in contexts}
    return Workload(QUESTION, sized, _take(passages, max(contexts)))


def first_passages(bundle: Bundle, count: int) -> tuple[GivenPassage, ...]:
    """The sample corpus's first ``count`` passages that fill the bundle's passages to three quarters at least."""
    full = (passage for passage, tokens in _passages(bundle) if 4 * tokens >= 3 * bundle.passage_tokens)
    found = tuple(islice(full, count))
    if len(found) < count:
        raise SettingsError(f"the sample corpus has only {len(found)} passages of that size")
    return found


def _take(passages: Iterator[tuple[GivenPassage, int]], tokens: int) -> tuple[GivenPassage, ...]:
    taken: list[GivenPassage] = []
    left = tokens
    while left > 0:
        found = next(passages, None)
        if found is None:
            raise SettingsError("the sample corpus has too few passages for contexts of these sizes")
        taken.append(found[0])
        left -= found[1]
    return tuple(taken)


def _passages(bundle: Bundle) -> Iterator[tuple[GivenPassage, int]]:
    """The almanac's passages with the tokens of their blocks."""
    tokenizer = bundle.load_tokenizer()
    splitter = PassageSplitter(bundle.template, tokenizer, bundle.passage_tokens)
    for article in load_articles():
        title = splitter.fit_title(article.title)
        for text in splitter.split(title, [article.text], markdown=True):
            yield GivenPassage(text, title.text), len(bundle.template.passage_ids(tokenizer, title.text, text))
