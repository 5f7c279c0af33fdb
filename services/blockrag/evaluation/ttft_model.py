"""Time to first token of the model alone: what each way of bringing context to it costs.

All ways are interleaved in one run, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from blockrag.budget import chunk_count, expand_at_rate
from blockrag.decoder.block_loading import EncodingBlockSource
from blockrag.decoder.engine import Engine
from blockrag.decoder.sequence import Event, GenerationRequest, SamplingParams, StageSeconds
from blockrag.decoder.service import assemble
from blockrag.evaluation.ttft_grpc import RATES, ReportRow, make_row, states_of
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.refrag.compression import compose_passage
from blockrag.modeling.slots import ResidentBlock, Slots
from blockrag.settings import Settings
from blockrag.types import BlockKV

_PIECE_TOKENS = 1024
_RESERVED = 64


def measure_model_ttft(
    bundle: Bundle,
    settings: Settings,
    contexts: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    question_tokens: int = 50,
    repeats: int = 20,
    *,
    chunk_tokens: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[ReportRow]:
    """Measure every state that these chunks allow at every context length, ``repeats`` times, after a warm-up round.

    First tokens come from the decoder's engine, with the settings' threads and pieces of prefills.

    Contexts are random tokens in blocks of the bundle's ``passage_tokens``, and compressed blocks random input
    embeddings, one for each chunk of ``chunk_tokens`` (None: the bundle's): what they hold changes no time, so a bundle
    need not have chunk compression. ``progress(done, total)`` is called after each round. Raises ValueError when a
    context does not fit the model.
    """
    chunk = chunk_tokens or bundle.chunk_tokens
    chosen = states_of("model", chunk)
    bench = _Bench(bundle, settings, question_tokens, device, chunk)
    longest = max(contexts, default=0) + question_tokens + _RESERVED
    if longest > bench.model.max_positions:
        raise ValueError(f"{longest} positions, where the model has {bench.model.max_positions}")
    cases = [_Case(bench, context) for context in contexts]
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(repeats + 1):
        for case in cases:
            for method in chosen:
                elapsed = case.time_ms(method)
                if number > 0:
                    times.setdefault((method, case.context), []).append(elapsed)
        progress(number + 1, repeats + 1)
    return [
        make_row(
            "model",
            method,
            case.context,
            times[method, case.context],
            times.get(("none", case.context)),
            case.slots(method),
            case.kv_bytes(method),
        )
        for case in cases
        for method in chosen
    ]


class _Bench:
    """The models and the question, shared by all context lengths."""

    def __init__(
        self, bundle: Bundle, settings: Settings, question_tokens: int, device: str, chunk_tokens: int
    ) -> None:
        self.model = SlotModel.load(bundle, device=device)
        self.engine = engine_of(
            bundle, self.model, settings, slots=max(settings.decoder.slots, self.model.max_positions)
        )
        self.threads = settings.decoder.threads
        self.stock: PreTrainedModel = load_stock_model(bundle, device=device)
        self.block_tokens = bundle.passage_tokens
        self.chunk_tokens = chunk_tokens
        self.chooser = random.Random(0)
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
        self._masks = {method: self._mask(rate) for method, rate in RATES.items() if rate < bench.chunk_tokens}

    def slots(self, method: str) -> int:
        """Slots of the passages in the prompt."""
        if method == "none":
            return 0
        if method in ("compressed_copied", "compressed_l1"):
            return sum(block.num_slots for block in self._short)
        if method in self._masks:
            return sum(slots.num_slots for slots in self._mixture(method))
        return self.context

    def kv_bytes(self, method: str) -> int:
        """K and V moved to the slot list."""
        return 0 if method in ("none", "stock", "full") else self.slots(method) * self._bench.model.slot_bytes

    def time_ms(self, method: str) -> float:
        run: dict[str, Callable[[], None]] = {
            "none": lambda: self._answer([], self._bench.question),
            "stock": self._stock,
            "full": lambda: self._answer([], [token for block in self._blocks for token in block]
                                         + self._bench.question),
            "block_cold": lambda: self._answer(self._place(self._encode()), self._bench.question),
            "block_copied": lambda: self._answer(self._place(self._stored), self._bench.question),
            "block_l1": lambda: self._answer(self._resident, self._bench.question),
            "compressed_copied": lambda: self._answer(self._place(self._short_stored), self._bench.question),
            "compressed_l1": lambda: self._answer(self._short, self._bench.question),
            **{rate: lambda: self._answer(self._mixture(method), self._bench.question) for rate in self._masks},
        }  # fmt: skip
        # the engine sets its own number for each step; all else has as many as it may have
        torch.set_num_threads(self._bench.threads)
        start = time.perf_counter()
        run[method]()
        return (time.perf_counter() - start) * 1000

    def _encode(self) -> list[BlockKV]:
        return encode_in_passes(self._bench.model, self._blocks, self._keys)

    def _encode_compressed(self) -> list[BlockKV]:
        model, chunk = self._bench.model, self._bench.chunk_tokens
        rows = [torch.randn(chunk_count(len(block), chunk), model.width) for block in self._blocks]
        return model.encode_embeddings(rows, self._blocks, self._keys)

    def _mask(self, rate: int) -> list[list[bool]]:
        """Which chunks are expanded: random ones, which makes as many slices as there can be."""
        sizes = [len(block) for block in self._blocks]
        logits = np.array([self._bench.chooser.random() for short in self._short for _ in range(short.num_slots)])
        expanded = expand_at_rate(logits.astype(np.float32), sizes, self._bench.chunk_tokens, rate)
        ends = np.cumsum([short.num_slots for short in self._short])
        return [part.tolist() for part in np.split(expanded, ends[:-1])]

    def _mixture(self, method: str) -> list[Slots]:
        passages = zip(self._resident, self._short, self._masks[method], strict=True)
        chunk = self._bench.chunk_tokens
        return [piece for full, short, mask in passages for piece in compose_passage(full, short, mask, chunk)]

    def _place(self, blocks: Sequence[BlockKV]) -> list[ResidentBlock]:
        return [self._bench.model.to_resident(block) for block in blocks]

    def _answer(self, blocks: Sequence[Slots], tokens: Sequence[int]) -> None:
        """Have the decoder's engine generate the first token, in this thread."""
        request = GenerationRequest("bench", tuple(blocks), tuple(tokens), SamplingParams(max_tokens=1))
        answer_in_thread(self._bench.engine, [request])

    @torch.inference_mode()
    def _stock(self) -> None:
        tokens = [token for block in self._blocks for token in block] + self._bench.question
        inputs = torch.tensor([tokens], device=self._bench.stock.device)
        int(self._bench.stock(input_ids=inputs, use_cache=True, logits_to_keep=1).logits.argmax())


def engine_of(bundle: Bundle, model: SlotModel, settings: Settings, **decoder: int) -> Engine:
    """The decoder's engine in this process, with the settings but for what ``decoder`` says."""
    changed = settings.model_copy(update={"decoder": settings.decoder.model_copy(update=decoder)})
    return assemble(bundle, model, EncodingBlockSource(model), changed).engine


def answer_in_thread(engine: Engine, requests: Sequence[GenerationRequest]) -> list[StageSeconds]:
    """Have the engine answer requests together, in the calling thread: how long the stages of each took."""
    heard: list[list[Event]] = [[] for _ in requests]
    for request, events in zip(requests, heard, strict=True):
        engine.submit(request, events.append)
    while engine.step():
        pass
    found = []
    for events in heard:
        last = events[-1] if events else Event()
        if last.finish is None:
            raise RuntimeError("the engine gave no answer") from last.error
        found.append(last.finish.stages)
    return found


def encode_in_passes(model: SlotModel, blocks: Sequence[Sequence[int]], keys: Sequence[str]) -> list[BlockKV]:
    """Encode blocks, as many in a pass as serving takes."""
    encoded: list[BlockKV] = []
    per_pass = max(1, _PIECE_TOKENS // max(map(len, blocks), default=1))
    for start in range(0, len(blocks), per_pass):
        span = slice(start, start + per_pass)
        encoded += model.encode(blocks[span], keys[span])
    return encoded
