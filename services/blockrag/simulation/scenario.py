"""What is simulated: the cluster and its load, and how long each part of an answer takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Self

from blockrag.errors import InvalidRequestError
from blockrag.limits import MIB

Caching = Literal["block", "prefix", "none"]
Routing = Literal["shorter", "random", "round-robin", "held"]


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one machine's parts of an answer; the defaults were measured with the bundled reader on two cores."""

    before_s: float = 0.025
    """From the request to the decoder: gateway, search, plan."""
    prefill_s: float = 0.071
    """First step of a question without passages."""
    slot_s: float = 2.0e-5
    """More of that step for each cached slot that the question attends to."""
    token_s: float = 7.7e-4
    """Prefilling one passage token in the prompt, where no block is cached."""
    pair_s: float = 2.7e-7
    """More of it for each token before it."""
    step_s: float = 0.034
    """One decode step of one answer."""
    stream_s: float = 0.002
    """More of a step for each further answer in it."""
    step_slot_s: float = 2.3e-6
    """More of a step for each slot of its answers."""
    encode_s: float = 7.1e-4
    """Encoding one token of a block."""
    copy_s: float = 1.2e-9
    """Bringing one byte of a block from the machine's own object store into the decoder."""
    network_s: float = 1.0e-9
    """One byte of a block from another machine: 8 Gbit/s."""
    disk_s: float = 1.0e-9
    """One byte of a block from disk."""
    hop_s: float = 0.002
    """Asking a shard, and a round trip to another machine."""

    @classmethod
    def of_bench(cls, path: Path) -> Self:
        """Times that ``blockrag bench ttft --out`` measured; what it does not measure keeps its default.

        Raises InvalidRequestError for a file without the rows of the model alone.
        """
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            by_state = {
                state: {
                    int(row["context_tokens"]): row["median_ms"] / 1000
                    for row in rows
                    if (row["path"], row["state"]) == ("model", state)
                }
                for state in ("none", "block_l1", "block_cold", "full")
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError("bench", f"{path}: no result of `blockrag bench ttft`: {error!r}") from error
        none, warm, cold, full = by_state.values()
        sizes = sorted(set(none) & set(warm) & set(cold) & set(full))
        if len(sizes) < 2:
            raise InvalidRequestError("bench", f"{path}: needs the model's rows at two context sizes or more")
        bare = sum(none[size] for size in sizes) / len(sizes)
        largest, smallest = sizes[-1], sizes[0]
        # full - none = token_s n + pair_s n²/2, through the smallest and the largest context
        per_token = {size: (full[size] - none[size]) / size for size in (smallest, largest)}
        pair = max(0.0, 2 * (per_token[largest] - per_token[smallest]) / (largest - smallest))
        return cls(
            prefill_s=bare,
            slot_s=max(0.0, (warm[largest] - bare) / largest),
            token_s=max(0.0, per_token[smallest] - pair * smallest / 2),
            pair_s=pair,
            encode_s=max(0.0, (cold[largest] - warm[largest]) / largest),
        )


@dataclass(frozen=True)
class Scenario:
    """A cluster of equal machines, each with a decoder, an encoder and a shard of the cache, and its load.

    Rejected with InvalidRequestError naming the field when a number is out of its range.
    """

    machines: int = 1
    """Machines."""
    rate: float = 1.0
    """Questions a second, arriving at random (Poisson)."""
    passages: int = 4_000
    """Passages of the corpus."""
    passage_tokens: int = 128
    """Tokens of a passage."""
    top_k: int = 5
    """Passages of a question."""
    variety: int = 10
    """Passages of one topic; each question takes top-k of its topic's, in an order of its own."""
    exponent: float = 1.0
    """Zipf's exponent over topics: 0 asks about all alike."""
    drift: float = 0.0
    """Topics by which the order of popularity moves on, an hour."""
    answer_tokens: int = 12
    """Tokens of an answer."""
    slot_bytes: int = 23_040
    """Bytes of K and V of one token."""
    l1_mb: float = 256.0
    """The decoder's memory of blocks, a machine."""
    store_mb: float = 512.0
    """The cache's object store, a machine."""
    disk_mb: float = 0.0
    """The cache's disk, a machine."""
    caching: Caching = "block"
    """block: this system; prefix: a prompt's KV is found again where it begins alike, in as much memory; none."""
    routing: Routing = "shorter"
    """Which decoder: the shorter queue of two at random, as Serve does; at random; in turn; or who holds most bytes."""
    max_sequences: int = 8
    """Answers that a decoder computes at once; the rest waits."""
    questions: int = 10_000
    """Questions counted, after a fifth as many that warm the caches."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        """Checks every number."""
        for item in fields(self):
            value = getattr(self, item.name)
            least = _LEAST.get(item.name, 0)
            if isinstance(value, int | float) and not value >= least:
                raise InvalidRequestError(item.name, f"{value:g}: must be at least {least:g}")
        if self.rate == 0:
            raise InvalidRequestError("rate", "must be above 0")
        if self.variety < self.top_k:
            raise InvalidRequestError("variety", f"{self.variety}: must be at least top_k, {self.top_k}")
        if self.passages < self.variety:
            raise InvalidRequestError("passages", f"{self.passages}: must be at least variety, {self.variety}")

    @property
    def block_bytes(self) -> int:
        """Bytes of a passage's block."""
        return self.passage_tokens * self.slot_bytes

    @property
    def topics(self) -> int:
        """Topics of the corpus."""
        return self.passages // self.variety

    def held_blocks(self, megabytes: float) -> int:
        """Blocks that fit."""
        return int(megabytes * MIB / self.block_bytes)


_COUNTS = ("machines", "passages", "passage_tokens", "top_k", "variety", "answer_tokens", "slot_bytes")
_LEAST: Mapping[str, int] = dict.fromkeys((*_COUNTS, "max_sequences", "questions"), 1)


def prefill_seconds(times: StageTimes, new: int, held: int) -> float:
    """Of a question's first step with ``new`` passage tokens prefilled behind ``held`` cached ones."""
    pairs = new * held + new * new / 2
    return times.prefill_s + times.slot_s * (held + new) + times.token_s * new + times.pair_s * pairs


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
