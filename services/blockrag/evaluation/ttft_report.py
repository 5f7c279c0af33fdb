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
    for rate in (4, 8, 16):
        if rate == chunk_tokens:
            notes.append(f"rate {rate} is everything compressed")
        elif rate > chunk_tokens:
            notes.append(f"rate {rate} is not reachable")
    return [f"with chunks of {chunk_tokens} tokens, {', '.join(notes)}"] if notes else []
