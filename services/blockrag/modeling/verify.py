"""The correctness gate of a model: ``blockrag bundle verify``.

Slot attention is compared with the stock transformers model, layer by layer: full mode with a plain forward pass,
block mode with one forward pass under the explicit block mask and global positions; for a bundle that compresses
chunks, mixtures of full and compressed blocks too (``blockrag.modeling.refrag.mixture_gate``). Both at the first
positions and at the model's last. A bundle that passes gives the same answers from cached blocks as the mask would.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.refrag.mixture_gate import MixtureGate, ThroughStore, final_pass
from blockrag.modeling.slots import SequenceState
from blockrag.modeling.stock_passes import Check, Difference, Limits, block_mask, stock_mask, traced
from blockrag.types import BlockKV

LIMITS = {
    ("float32", "float32"): Limits(relative=1e-4, layers=1e-4, agreement=0.99, divergence=1e-6),
    ("float32", "bfloat16"): Limits(relative=0.04, layers=0.08, agreement=0.85, divergence=1e-3),
    ("bfloat16", "bfloat16"): Limits(relative=0.1, layers=0.2, agreement=0.75, divergence=1.5e-2),
}
"""By the types of weights and of K and V; measured in docs/decisions.md."""

SENTENCES = (
    "The river rises in the hills north of the town and reaches the sea after 214 kilometres.",
    "Anna Lindqvist opened the first observatory of the island in 1907; it was moved twice before 1950.",
    "Copper, timber and dried fish were shipped from the old harbour. The railway came in 1889.",
    "In spring the lake floods the lower meadows, where storks and cranes rest on their way north.",
)
"""Text of no source; only its tokens matter."""
_STEPPED = 64
"""Tokens of a final block that are predicted step by step where steps have weights of their own."""
QUESTION = "When was the first observatory opened, and by whom?"


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of a bundle."""

    bundle: str
    fingerprint: str
    compute_dtype: str
    kv_dtype: str
    weights: str
    """What decode steps read: as asked for, where this machine can."""
    limits: Limits
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(check.passed for check in self.checks)


def verify_bundle(
    bundle: Bundle | str | Path,
    *,
    through_store: ThroughStore | None = None,
    texts: Sequence[str] | None = None,
) -> VerifyReport:
    """Compare a bundle's model over slots with the stock model on random and real text.

    ``through_store`` takes a block through the store that serves it (default: pickled and read back read-only);
    ``texts`` are passages to use instead of ``SENTENCES``. Raises BundleError or UnsupportedModelError when the model
    does not load.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(bundle)
    model = SlotModel.load(bundle)
    limits = limits_of(bundle.compute_dtype, bundle.kv_dtype, model.weights)
    gate = _Gate(stock=load_stock_model(bundle), model=model, limits=limits)
    shuffler = random.Random(0)
    mixtures = None
    if bundle.refrag is not None:
        compressor = ChunkCompressor.load(bundle)
        mixtures = MixtureGate(gate.stock, gate.model, compressor, limits)
    checks = []
    for source, blocks, final in _prompts(bundle, gate.model, texts or SENTENCES, shuffler):
        shuffled = list(range(len(blocks)))
        while len(shuffled) > 1 and shuffled == sorted(shuffled):
            shuffler.shuffle(shuffled)
        stored = through_store or _pickled
        checks += [
            gate.full_mode(f"full mode, {source}", [token for block in blocks for token in block] + final),
            gate.block_mode(f"block mode, {source}", blocks, final),
            gate.block_mode(f"block mode shuffled, {source}", blocks, final, order=shuffled),
            gate.block_mode(f"block mode through the store, {source}", blocks, final, through_store=stored),
        ]
        if source == "text":
            far = gate.model.max_positions - sum(map(len, blocks)) - len(final)
            tokens = [token for block in blocks for token in block] + final
            checks += [
                gate.full_mode(f"full mode up to the last position, {source}", tokens, first=far),
                gate.block_mode(f"block mode up to the last position, {source}", blocks, final, first=far),
            ]
        if mixtures is not None:
            checks += mixtures.checks(source, blocks, final, shuffler, stored)
    return VerifyReport(
        bundle=bundle.name,
        fingerprint=bundle.fingerprint,
        compute_dtype=bundle.compute_dtype,
        kv_dtype=bundle.kv_dtype,
        weights=gate.model.weights,
        limits=limits,
        checks=tuple(checks),
    )


def limits_of(compute_dtype: str, kv_dtype: str, weights: str) -> Limits:
    """What is allowed for these types; steps in eight bits round to bfloat16 what they multiply, in any model."""
    if weights == "int8":
        compute_dtype = "bfloat16"
    return LIMITS.get((compute_dtype, kv_dtype), LIMITS["bfloat16", "bfloat16"])


class _Gate:
    def __init__(self, stock: PreTrainedModel, model: SlotModel, limits: Limits) -> None:
        self.stock = stock
        self.model = model
        self._limits = limits

    @torch.inference_mode()
    def full_mode(self, name: str, tokens: list[int], *, first: int = 0) -> Check:
        """A prefill in two pieces and two decode steps, from position ``first`` on, against one plain forward pass."""
        expected, layers = self._reference(tokens, None, first)
        cuts = sorted({len(tokens) // 3, len(tokens) - 2, len(tokens) - 1, len(tokens)} - {0})
        state = self.model.new_sequence([], len(tokens), first_position=first)
        difference = Difference(self._limits)
        start = 0
        logits = []
        for end in cuts:
            with self.model.traced() as trace:
                logits.append((end - 1, self.model.forward([(state, tokens[start:end])])[0]))
            difference.compare_layers(trace, layers, slice(start, end))
            start = end
        for position, got in logits:
            difference.compare("logits", len(layers), got, expected[position])
        state.release()
        again = self.model.new_sequence([], len(tokens), first_position=first)
        difference.compare_predictions(self._all_logits(again, tokens), expected)
        return difference.check(name)

    @torch.inference_mode()
    def block_mode(
        self,
        name: str,
        blocks: list[list[int]],
        final: list[int],
        *,
        order: Sequence[int] | None = None,
        through_store: ThroughStore | None = None,
        first: int = 0,
    ) -> Check:
        """Cached blocks, composed in ``order`` from position ``first`` on, and the final block against the mask."""
        order = range(len(blocks)) if order is None else order
        placed = [blocks[index] for index in order]
        mask = block_mask([len(block) for block in placed], len(final))
        expected, layers = self._reference([token for block in placed for token in block] + final, mask, first)
        difference = Difference(self._limits)
        encoded = []
        for number, block in enumerate(placed):
            with self.model.traced() as trace:
                encoded += self.model.encode([block], [f"verify-{number}"])
            difference.compare_encoded(trace, layers, sum(len(earlier) for earlier in placed[:number]))
        if through_store is not None:
            encoded = [through_store(block) for block in encoded]
        resident = [self.model.to_resident(block) for block in encoded]
        difference.compare_final(final_pass(self.model, resident, final, first), (expected[-1], layers))
        again = self.model.new_sequence(resident, len(final), first_position=first)
        difference.compare_predictions(self._all_logits(again, final), expected[-len(final) :])
        return difference.check(name)

    def _all_logits(self, state: SequenceState, tokens: list[int]) -> Tensor:
        if self.model.weights == "int8" and len(tokens) <= _STEPPED:
            logits = torch.cat([self.model.forward([(state, [token])]) for token in tokens])
        else:  # every token's at once: by the whole weights, whatever steps read
            logits = self.model.forward([(state, tokens)], every_token=True)
        state.release()
        return logits

    def _reference(self, tokens: list[int], allowed: Tensor | None, first: int) -> tuple[Tensor, list[Tensor]]:
        inputs = torch.tensor([tokens], device=self.stock.device)
        positions = torch.arange(first, first + len(tokens), device=self.stock.device)[None]
        mask = None if allowed is None else stock_mask(self.stock, allowed)
        with traced(self.stock.model.layers) as trace:
            output = self.stock(input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.logits[0], trace


def _prompts(
    bundle: Bundle, model: SlotModel, texts: Sequence[str], shuffler: random.Random
) -> Iterator[tuple[str, list[list[int]], list[int]]]:
    room = min(model.max_positions, 512)
    lengths = [1, room // 8, room // 30, room // 5, room // 16]
    yield "random tokens", [_random_ids(model, shuffler, max(1, n)) for n in lengths], _random_ids(model, shuffler, 24)
    tokenizer = bundle.load_tokenizer()
    final = bundle.template.final_ids(tokenizer, QUESTION)
    blocks = [bundle.template.instruction_ids(tokenizer)]
    for number, text in enumerate(texts):
        block = bundle.template.passage_ids(tokenizer, f"Passage {number + 1}", text)[: bundle.passage_tokens]
        if sum(map(len, blocks)) + len(block) + len(final) <= model.max_positions:
            blocks.append(block)
    yield "text", [block for block in blocks if block], final


def _random_ids(model: SlotModel, shuffler: random.Random, length: int) -> list[int]:
    return [shuffler.randrange(model.vocab_size) for _ in range(length)]


def _pickled(block: BlockKV) -> BlockKV:
    copy: BlockKV = pickle.loads(pickle.dumps(block))
    for array in (copy.token_ids, copy.keys, copy.values):
        array.flags.writeable = False
    return copy
