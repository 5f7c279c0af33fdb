"""Time to first token of the model alone: what each way of bringing context to it costs.

All ways are interleaved in one run, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from blockrag.budget import chunk_count
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.refrag.composing import compose_passage
from blockrag.modeling.slots import ResidentBlock, SequenceState, Slots
from blockrag.types import BlockKV

Method = Literal[
    "none",
    "stock",
    "full",
    "block_cold",
    "block_store",
    "block_l1",
    "compressed_store",
    "compressed_l1",
    "rate_4",
    "rate_8",
    "rate_16",
]
METHODS: tuple[Method, ...] = get_args(Method)
"""In order: the question alone; stock transformers, full prefill with a KV cache; our full mode; block mode with the
blocks encoded first; block mode from blocks as the store holds them; block mode from resident blocks; every chunk
compressed, from the store and resident; a mixture of expanded and compressed chunks with so many tokens per slot, both
forms resident."""
_RATES: dict[Method, int] = {"rate_4": 4, "rate_8": 8, "rate_16": 16}

_PIECE_TOKENS = 1024
_RESERVED = 64


@dataclass(frozen=True)
class TtftRow:
    """One way at one context length. Times are milliseconds from token ids to the first token's id."""

    method: Method
    context_tokens: int
    slots: int
    """Slots of the passages in the prompt."""
    kv_bytes: int
    """K and V moved from where they are kept to the prompt's slot list; 0 where they are computed."""
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
    methods: Sequence[Method] | None = None,
    chunk_tokens: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[TtftRow]:
    """Measure every method at every context length, ``repeats`` times, interleaved, after one warm-up round.

    Contexts are random tokens in blocks of the bundle's ``passage_tokens``, and compressed blocks random input
    embeddings, one for each chunk of ``chunk_tokens`` (None: the bundle's): what they hold changes no time, so a bundle
    need not have chunk compression. ``methods`` default to those that these chunks allow. ``progress(done, total)`` is
    called after each round. Raises ValueError when a context does not fit the model, or a rate is not below
    ``chunk_tokens``.
    """
    chunk = chunk_tokens or bundle.chunk_tokens
    chosen = reachable_methods(chunk) if methods is None else tuple(methods)
    beyond = [method for method in chosen if method not in reachable_methods(chunk)]
    if beyond:
        raise ValueError(f"{', '.join(beyond)}: chunks of {chunk} tokens do not allow such a mixture")
    bench = _Bench(bundle, question_tokens, device, seed, chunk)
    longest = max(contexts, default=0) + question_tokens + _RESERVED
    if longest > bench.model.max_positions:
        raise ValueError(f"{longest} positions, where the model has {bench.model.max_positions}")
    cases = [_Case(bench, context) for context in contexts]
    times: dict[tuple[Method, int], list[float]] = {}
    for number in range(repeats + 1):
        for case in cases:
            for method in chosen:
                elapsed = case.time_ms(method)
                if number > 0:
                    times.setdefault((method, case.context), []).append(elapsed)
        if progress is not None:
            progress(number + 1, repeats + 1)
    return [_row(times, method, case, question_tokens) for case in cases for method in chosen]


def reachable_methods(chunk_tokens: int) -> tuple[Method, ...]:
    """The methods that chunks of so many tokens allow: a mixture's rate is below theirs."""
    return tuple(method for method in METHODS if _RATES.get(method, 0) < chunk_tokens)


def _row(times: dict[tuple[Method, int], list[float]], method: Method, case: _Case, question_tokens: int) -> TtftRow:
    context = case.context
    own = times[method, context]

    def ratio_to(other: Method) -> float:
        others = times.get((other, context))
        return median(own) / median(others) if others else float("nan")

    return TtftRow(
        method=method,
        context_tokens=context,
        slots=case.slots(method),
        kv_bytes=case.kv_bytes(method),
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

    def __init__(self, bundle: Bundle, question_tokens: int, device: str, seed: int, chunk_tokens: int) -> None:
        self.model = SlotModel.load(bundle, device=device)
        self.stock: PreTrainedModel = load_stock_model(bundle, device=device)
        self.block_tokens = bundle.passage_tokens
        self.chunk_tokens = chunk_tokens
        self.chooser = random.Random(seed)
        self.question = self.random_ids(question_tokens)

    def random_ids(self, count: int) -> list[int]:
        return [self.chooser.randrange(self.model.vocab_size) for _ in range(count)]


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
        self._short_stored: list[BlockKV] = [pickle.loads(pickle.dumps(block)) for block in self._encode_compressed()]
        self._short: list[ResidentBlock] = [bench.model.to_resident(block) for block in self._short_stored]
        self._masks = {method: self._mask(rate) for method, rate in _RATES.items() if rate < bench.chunk_tokens}

    def slots(self, method: Method) -> int:
        """Slots of the passages in the prompt."""
        if method == "none":
            return 0
        if method in ("compressed_store", "compressed_l1"):
            return sum(block.num_slots for block in self._short)
        if method in self._masks:
            return sum(slots.num_slots for slots in self._mixture(method))
        return self.context

    def kv_bytes(self, method: Method) -> int:
        """K and V moved to the slot list."""
        return 0 if method in ("none", "stock", "full") else self.slots(method) * self._bench.model.slot_bytes

    def time_ms(self, method: Method) -> float:
        run: dict[Method, Callable[[], torch.Tensor]] = {
            "none": lambda: self._answer([], self._bench.question),
            "stock": self._stock,
            "full": lambda: self._answer([], [token for block in self._blocks for token in block]
                                         + self._bench.question),
            "block_cold": lambda: self._answer(self._place(self._encode()), self._bench.question),
            "block_store": lambda: self._answer(self._place(self._stored), self._bench.question),
            "block_l1": lambda: self._answer(self._resident, self._bench.question),
            "compressed_store": lambda: self._answer(self._place(self._short_stored), self._bench.question),
            "compressed_l1": lambda: self._answer(self._short, self._bench.question),
            **{rate: partial(self._mixed, rate) for rate in self._masks},
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

    def _encode_compressed(self) -> list[BlockKV]:
        model, chunk = self._bench.model, self._bench.chunk_tokens
        rows = [torch.randn(chunk_count(len(block), chunk), model.width) for block in self._blocks]
        return model.encode_embeddings(rows, self._blocks, self._keys)

    def _mask(self, rate: int) -> list[list[bool]]:
        """Which chunks are expanded: random ones, which makes as many slices as there can be."""
        masks = [[False] * block.num_slots for block in self._short]
        places = [(number, place) for number, mask in enumerate(masks) for place in range(len(mask))]
        self._bench.chooser.shuffle(places)
        left = self.context // rate - len(places)
        for number, place in places:
            cost = min(self._bench.chunk_tokens, len(self._blocks[number]) - place * self._bench.chunk_tokens) - 1
            if cost <= left:
                masks[number][place] = True
                left -= cost
        return masks

    def _mixture(self, method: Method) -> list[Slots]:
        passages = zip(self._resident, self._short, self._masks[method], strict=True)
        chunk = self._bench.chunk_tokens
        return [piece for full, short, mask in passages for piece in compose_passage(full, short, mask, chunk)]

    def _mixed(self, method: Method) -> torch.Tensor:
        return self._answer(self._mixture(method), self._bench.question)

    def _place(self, blocks: Sequence[BlockKV]) -> list[ResidentBlock]:
        return [self._bench.model.to_resident(block) for block in blocks]

    def _answer(self, blocks: Sequence[Slots], tokens: Sequence[int]) -> torch.Tensor:
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
