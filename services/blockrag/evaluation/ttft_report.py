"""Times to first token as rows of a table and lines of a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
