"""Time to first token of the model alone: what each way of bringing context to it costs.

All ways are interleaved in one run, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from transformers import PreTrainedModel

from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.slots import ResidentBlock, SequenceState
from blockrag.types import BlockKV

Method = Literal["none", "stock", "full", "block_cold", "block_store", "block_l1"]
METHODS: tuple[Method, ...] = ("none", "stock", "full", "block_cold", "block_store", "block_l1")
"""In order: the question alone; stock transformers, full prefill with a KV cache; our full mode; block mode with the
blocks encoded first; block mode from blocks as the store holds them; block mode from resident blocks."""

_PIECE_TOKENS = 1024
_RESERVED = 64


@dataclass(frozen=True)
class TtftRow:
    """One way at one context length. Times are milliseconds from token ids to the first token's id."""

    method: Method
    context_tokens: int
    question_tokens: int
    repeats: int
    min_ms: float
    p50_ms: float
    max_ms: float
    times_none: float
    """Median as a multiple of the median without retrieval."""
    share_of_stock: float
    """Median as a fraction of the median of stock transformers' full prefill."""


def measure_model_ttft(
    bundle: Bundle,
    contexts: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    question_tokens: int = 50,
    repeats: int = 20,
    *,
    methods: Sequence[Method] = METHODS,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[TtftRow]:
    """Measure every method at every context length, ``repeats`` times, interleaved, after one warm-up round.

    Contexts are random tokens in blocks of the bundle's ``passage_tokens``. ``progress(done, total)`` is called after
    each round. Raises ValueError when a context does not fit the model.
    """
    bench = _Bench(bundle, question_tokens, device, seed)
    longest = max(contexts, default=0) + question_tokens + _RESERVED
    if longest > bench.model.max_positions:
        raise ValueError(f"{longest} positions, where the model has {bench.model.max_positions}")
    cases = [_Case(bench, context) for context in contexts]
    times: dict[tuple[Method, int], list[float]] = {}
    for number in range(repeats + 1):
        for case in cases:
            for method in methods:
                elapsed = case.time_ms(method)
                if number > 0:
                    times.setdefault((method, case.context), []).append(elapsed)
        if progress is not None:
            progress(number + 1, repeats + 1)
    return [_row(times, method, context, question_tokens) for context in contexts for method in methods]


def _row(times: dict[tuple[Method, int], list[float]], method: Method, context: int, question_tokens: int) -> TtftRow:
    own = times[method, context]

    def ratio_to(other: Method) -> float:
        others = times.get((other, context))
        return median(own) / median(others) if others else float("nan")

    return TtftRow(
        method=method,
        context_tokens=context,
        question_tokens=question_tokens,
        repeats=len(own),
        min_ms=min(own),
        p50_ms=median(own),
        max_ms=max(own),
        times_none=ratio_to("none"),
        share_of_stock=ratio_to("stock"),
    )


class _Bench:
    """The models and the question, shared by all context lengths."""

    def __init__(self, bundle: Bundle, question_tokens: int, device: str, seed: int) -> None:
        self.model = SlotModel.load(bundle, device=device)
        self.stock: PreTrainedModel = load_stock_model(bundle, device=device)
        self.block_tokens = bundle.passage_tokens
        self._chooser = random.Random(seed)
        self.question = self.random_ids(question_tokens)

    def random_ids(self, count: int) -> list[int]:
        return [self._chooser.randrange(self.model.vocab_size) for _ in range(count)]


class _Case:
    """One context length: its blocks in every form."""

    def __init__(self, bench: _Bench, context: int) -> None:
        self.context = context
        self._bench = bench
        step = bench.block_tokens
        self._blocks = [bench.random_ids(min(step, context - start)) for start in range(0, context, step)]
        self._keys = [str(number) for number in range(len(self._blocks))]
        self._stored: list[BlockKV] = [pickle.loads(pickle.dumps(block)) for block in self._encode()]
        self._resident: list[ResidentBlock] = [bench.model.to_resident(block) for block in self._stored]

    def time_ms(self, method: Method) -> float:
        run: dict[Method, Callable[[], torch.Tensor]] = {
            "none": lambda: self._answer([], self._bench.question),
            "stock": self._stock,
            "full": lambda: self._answer([], [token for block in self._blocks for token in block]
                                         + self._bench.question),
            "block_cold": lambda: self._answer(self._place(self._encode()), self._bench.question),
            "block_store": lambda: self._answer(self._place(self._stored), self._bench.question),
            "block_l1": lambda: self._answer(self._resident, self._bench.question),
        }  # fmt: skip
        start = time.perf_counter()
        int(run[method]().argmax())
        return (time.perf_counter() - start) * 1000

    def _encode(self) -> list[BlockKV]:
        encoded: list[BlockKV] = []
        per_pass = max(1, _PIECE_TOKENS // self._bench.block_tokens)
        for start in range(0, len(self._blocks), per_pass):
            span = slice(start, start + per_pass)
            encoded += self._bench.model.encode(self._blocks[span], self._keys[span])
        return encoded

    def _place(self, blocks: Sequence[BlockKV]) -> list[ResidentBlock]:
        return [self._bench.model.to_resident(block) for block in blocks]

    def _answer(self, blocks: Sequence[ResidentBlock], tokens: Sequence[int]) -> torch.Tensor:
        state: SequenceState = self._bench.model.new_sequence(blocks, len(tokens) + _RESERVED)
        try:
            for start in range(0, len(tokens), _PIECE_TOKENS):
                logits = self._bench.model.forward([(state, tokens[start : start + _PIECE_TOKENS])])
            return logits
        finally:
            state.release()

    @torch.inference_mode()
    def _stock(self) -> torch.Tensor:
        tokens = [token for block in self._blocks for token in block] + self._bench.question
        inputs = torch.tensor([tokens], device=self._bench.stock.device)
        logits: torch.Tensor = self._bench.stock(input_ids=inputs, use_cache=True, logits_to_keep=1).logits
        return logits
