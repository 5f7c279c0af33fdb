"""The correctness gate of chunk compression: mixtures of full and compressed blocks against stock passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.budget import chunk_bounds
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor, compose_passage, mixed_inputs
from blockrag.modeling.slots import Slots
from blockrag.modeling.stock_passes import (
    EXACT,
    BlockPass,
    Check,
    ChosenSlot,
    Difference,
    FinalPass,
    Limits,
    additive_mask,
    block_mask,
    pass_block,
    pass_final,
    traced,
)
from blockrag.types import BlockKV

ThroughStore = Callable[[BlockKV], BlockKV]


@dataclass(frozen=True)
class _Passage:
    tokens: list[int]
    chunks: Tensor
    """Input embeddings of its chunks, [m, width], each encoded alone."""
    expanded: list[bool]


def final_pass(model: SlotModel, slots: Sequence[Slots], final: list[int], first: int = 0) -> FinalPass:
    """A final block behind ``slots``, from position ``first`` on."""
    state = model.new_sequence(slots, len(final), first_position=first)
    with model.traced() as trace:
        logits = model.forward([(state, final)])[0]
    state.release()
    return logits, trace


class MixtureGate:
    """Compares what the served path makes of a bundle's compressed passages with what it should be."""

    def __init__(self, stock: PreTrainedModel, model: SlotModel, compressor: ChunkCompressor, limits: Limits) -> None:
        self._stock = stock
        self._model = model
        self._compressor = compressor
        self._limits = limits

    @torch.inference_mode()
    def checks(
        self,
        source: str,
        blocks: Sequence[list[int]],
        final: list[int],
        shuffler: random.Random,
        through_store: ThroughStore,
    ) -> list[Check]:
        """All comparisons for one prompt, of which the first block is the instruction and never compressed."""
        instruction, passages = blocks[0], [self._passage(tokens, shuffler) for tokens in blocks[1:]]
        shuffled = passages[::-1]
        return [
            self._chunk_embeddings(f"chunk embeddings, {source}", passages),
            self._mixture(f"mixture, {source}", instruction, passages, final),
            self._mixture(f"mixture shuffled, {source}", instruction, shuffled, final),
            self._mixture(f"mixture through the store, {source}", instruction, passages, final, through_store),
            self._reencoded(f"mixture re-encoded, {source}", instruction, passages, final),
            self._exact(f"nothing compressed is block mode, {source}", instruction, passages, final, True),
            self._exact(f"all compressed is the compressed pass, {source}", instruction, passages, final, False),
        ]

    def _passage(self, tokens: list[int], shuffler: random.Random) -> _Passage:
        bounds = chunk_bounds(len(tokens), self._compressor.chunk_tokens)
        alone = [self._compressor.encoder([tokens[start:end]]) for start, end in bounds]
        chunks = torch.cat([self._compressor.projector(found) for found in alone])
        expanded = [shuffler.random() < 0.5 for _ in bounds]
        if len(bounds) > 1 and len(set(expanded)) == 1:
            expanded[shuffler.randrange(len(bounds))] ^= True
        return _Passage(tokens, chunks, expanded)

    def _chunk_embeddings(self, name: str, passages: Sequence[_Passage]) -> Check:
        """All chunks of all passages in one padded batch against each chunk alone."""
        difference = Difference(self._limits, "chunk embeddings")
        found = self._compressor.project(self._compressor.embed([passage.tokens for passage in passages]))
        for got, passage in zip(found, passages, strict=True):
            difference.compare("chunk embeddings", 0, got, passage.chunks)
        return difference.check(name)

    def _mixture(
        self,
        name: str,
        instruction: list[int],
        passages: Sequence[_Passage],
        final: list[int],
        through_store: ThroughStore | None = None,
    ) -> Check:
        """Composed slices of cached blocks against one stock pass per block and one over the chosen slots."""
        difference = Difference(self._limits)
        kept, expected_block = self._full(difference, instruction)
        pieces: list[Slots] = [self._model.to_resident(through_store(kept) if through_store else kept)]
        slots = [ChosenSlot(expected_block, place) for place in range(len(instruction))]
        k = self._compressor.chunk_tokens
        for passage in passages:
            full, expected_full = self._full(difference, passage.tokens)
            compressed, expected_compressed = self._compressed(difference, passage)
            if through_store is not None:
                full, compressed = through_store(full), through_store(compressed)
            pieces += compose_passage(
                self._model.to_resident(full), self._model.to_resident(compressed), passage.expanded, k
            )
            for place in range(len(passage.tokens)):
                if passage.expanded[place // k]:
                    slots.append(ChosenSlot(expected_full, place))
                elif place % k == 0:
                    slots.append(ChosenSlot(expected_compressed, place // k))
        with traced(self._stock.model.layers) as layers:
            expected = pass_final(self._stock, slots, final)
        difference.compare_final(final_pass(self._model, pieces, final), (expected[-1], layers))
        return difference.check(name)

    def _full(self, difference: Difference, tokens: list[int]) -> tuple[BlockKV, BlockPass]:
        inputs = self._stock.get_input_embeddings()(torch.tensor(tokens, device=self._stock.device))
        encode = partial(self._model.encode, [tokens], ["verify-full"])
        return self._encoded(difference, inputs, encode, "encode")

    def _compressed(self, difference: Difference, passage: _Passage) -> tuple[BlockKV, BlockPass]:
        encode = partial(self._model.encode_embeddings, [passage.chunks], [passage.tokens], ["verify-compressed"])
        return self._encoded(difference, passage.chunks, encode, "encode compressed")

    def _encoded(
        self, difference: Difference, inputs: Tensor, encode: Callable[[], list[BlockKV]], what: str
    ) -> tuple[BlockKV, BlockPass]:
        with traced(self._stock.model.layers) as layers:
            expected = pass_block(self._stock, inputs)
        with self._model.traced() as trace:
            (block,) = encode()
        difference.compare_encoded(trace, layers, what=what)
        return block, expected

    def _reencoded(self, name: str, instruction: list[int], passages: Sequence[_Passage], final: list[int]) -> Check:
        """Mixtures encoded anew against one stock pass over all input embeddings under the explicit block mask."""
        difference = Difference(self._limits)
        table = self._stock.get_input_embeddings()
        device, k = self._stock.device, self._compressor.chunk_tokens
        rows = [list(table(torch.tensor(instruction, device=device)))]
        for passage in passages:
            tokens = table(torch.tensor(passage.tokens, device=device))
            mixed = []
            for place, embedded in enumerate(tokens):
                if passage.expanded[place // k]:
                    mixed.append(embedded)
                elif place % k == 0:
                    mixed.append(passage.chunks[place // k].to(embedded))
            rows.append(mixed)
        rows.append(list(table(torch.tensor(final, device=device))))
        inputs = torch.stack([row for block in rows for row in block])[None]
        mask = additive_mask(block_mask([len(block) for block in rows[:-1]], len(final)).to(device), self._stock.dtype)
        positions = torch.arange(inputs.shape[1], device=device)[None]
        with traced(self._stock.model.layers) as layers:
            expected = self._stock(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits[0]
        blocks = self._model.encode([instruction], ["verify-full"])
        for number, passage in enumerate(passages):
            given = mixed_inputs(self._model, passage.tokens, passage.chunks, passage.expanded, k)
            start = sum(map(len, rows[: number + 1]))
            with self._model.traced() as trace:
                blocks += self._model.encode_embeddings([given], [passage.tokens], ["verify-mixed"])
            difference.compare_encoded(trace, layers, start)
        resident = [self._model.to_resident(block) for block in blocks]
        difference.compare_final(final_pass(self._model, resident, final), (expected[-1], layers))
        return difference.check(name)

    def _exact(
        self, name: str, instruction: list[int], passages: Sequence[_Passage], final: list[int], expand: bool
    ) -> Check:
        """Passages in one form only, composed chunk by chunk, against the same blocks placed whole: to the bit."""
        difference = Difference(EXACT)
        first = self._model.to_resident(self._model.encode([instruction], ["verify-full"])[0])
        pieces: list[Slots] = [first]
        whole: list[Slots] = [first]
        for passage in passages:
            if expand:
                (block,) = self._model.encode([passage.tokens], ["verify-full"])
            else:
                (block,) = self._model.encode_embeddings([passage.chunks], [passage.tokens], ["verify-compressed"])
            resident = self._model.to_resident(block)
            whole.append(resident)
            pieces += compose_passage(
                resident if expand else None,
                None if expand else resident,
                [expand] * len(passage.expanded),
                self._compressor.chunk_tokens,
            )
        difference.compare_final(final_pass(self._model, pieces, final), final_pass(self._model, whole, final))
        return difference.check(name)
