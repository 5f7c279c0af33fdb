"""Answers behind compositions: passages kept in both forms, any mask composed of them.

A passage is encoded once, full and compressed, and serves every selector, rate and question that shows it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blockrag.evaluation.decoding import BATCH_TOKENS, Job, answer_jobs
from blockrag.evaluation.pieces import Piece
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.composing import compose_passage, mixed_inputs
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.slots import ResidentBlock, SequenceState, Slots

Mask = NDArray[np.bool_]
"""[chunks] over the chunks of all passages of a prompt, true where a chunk is expanded."""


@dataclass(frozen=True)
class EncodedPassage:
    """A passage in all its forms."""

    token_ids: tuple[int, ...]
    embeddings: Tensor
    """Chunk embeddings, [m, encoder width]."""
    projected: Tensor
    """The decoder's input embeddings of the chunks, [m, width]."""
    full: ResidentBlock
    compressed: ResidentBlock

    @property
    def nbytes(self) -> int:
        return self.full.nbytes + self.compressed.nbytes


@dataclass(frozen=True)
class Composition:
    """A question and its passages under a mask."""

    passages: tuple[Piece, ...]
    question: str
    mask: Mask
    reencoded: bool = False
    """Each mixed passage is encoded anew as this mixture instead of composed: the exact alternative."""


class CompressionReader:
    """Answers compositions with one bundle. Not thread-safe."""

    def __init__(
        self,
        bundle: Bundle,
        model: SlotModel,
        compressor: ChunkCompressor,
        *,
        max_answer_tokens: int = 64,
        kept_bytes: int = 2**30,
    ) -> None:
        """``kept_bytes``: encoded passages kept for later calls, the longest unused ones are dropped."""
        self.bundle = bundle
        self.model = model
        self.compressor = compressor
        self.tokenizer = bundle.load_tokenizer()
        self.chunk_tokens = compressor.chunk_tokens
        self._max_answer_tokens = max_answer_tokens
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[Piece, EncodedPassage] = OrderedDict()
        instruction = bundle.template.instruction_ids(self.tokenizer)
        encoded = model.encode([instruction], ["instruction"]) if instruction else []
        self._instruction = [model.to_resident(block) for block in encoded]

    def question_ids(self, question: str) -> list[int]:
        """Token ids of the final block."""
        return self.bundle.template.final_ids(self.tokenizer, question)

    def passages(self, pieces: Sequence[Piece]) -> dict[Piece, EncodedPassage]:
        """The passages in all forms; those that are not kept are encoded."""
        needed = list(dict.fromkeys(pieces))
        missing = [piece for piece in needed if piece not in self._kept]
        for batch, blocks in self._batches(missing):
            embeddings = self.compressor.embed(blocks)
            projected = self.compressor.project(embeddings)
            names = [str(number) for number in range(len(batch))]
            full = self.model.encode(blocks, names)
            short = self.model.encode_embeddings(projected, blocks, names)
            for number, piece in enumerate(batch):
                self._kept[piece] = EncodedPassage(
                    token_ids=tuple(blocks[number]),
                    embeddings=embeddings[number],
                    projected=projected[number],
                    full=self.model.to_resident(full[number]),
                    compressed=self.model.to_resident(short[number]),
                )
        found = {}
        for piece in needed:
            self._kept.move_to_end(piece)
            found[piece] = self._kept[piece]
        kept = sum(passage.nbytes for passage in self._kept.values())
        while kept > self._kept_bytes and len(self._kept) > len(needed):
            kept -= self._kept.popitem(last=False)[1].nbytes
        return found

    def answer(self, compositions: Sequence[Composition]) -> list[str]:
        """Greedy answers. Raises ``PromptTooLongError`` for a prompt beyond the model's positions."""
        encoded = self.passages([piece for one in compositions for piece in one.passages])
        jobs = []
        for one in compositions:
            shown = [encoded[piece] for piece in one.passages]
            job = Job(
                slots=sum(len(passage.token_ids) for passage in shown),
                fresh=self.question_ids(one.question),
                start=partial(self._start, shown, one),
            )
            jobs.append(job)
        return answer_jobs(self.model, self.tokenizer, jobs, self._max_answer_tokens)

    def _start(self, shown: Sequence[EncodedPassage], composition: Composition, capacity: int) -> SequenceState:
        slots: list[Slots] = [*self._instruction]
        at = 0
        for passage in shown:
            expanded = composition.mask[at : at + len(passage.embeddings)].tolist()
            at += len(expanded)
            mixed = any(expanded) and not all(expanded)
            if composition.reencoded and mixed:
                slots.append(self._reencoded(passage, expanded))
            else:
                slots += compose_passage(passage.full, passage.compressed, expanded, self.chunk_tokens)
        return self.model.new_sequence(slots, capacity)

    def _reencoded(self, passage: EncodedPassage, expanded: Sequence[bool]) -> ResidentBlock:
        inputs = mixed_inputs(self.model, passage.token_ids, passage.projected, expanded, self.chunk_tokens)
        (block,) = self.model.encode_embeddings([inputs], [passage.token_ids], ["mixed"])
        return self.model.to_resident(block)

    def _batches(self, pieces: Sequence[Piece]) -> list[tuple[list[Piece], list[list[int]]]]:
        """Pieces with their token ids, in batches of about equal lengths."""
        ids = {p: self.bundle.template.passage_ids(self.tokenizer, p.title, p.text) for p in pieces}
        batches: list[tuple[list[Piece], list[list[int]]]] = []
        tokens = 0
        for piece in sorted(pieces, key=lambda one: len(ids[one])):
            if not batches or tokens + len(ids[piece]) > BATCH_TOKENS:
                batches.append(([], []))
                tokens = 0
            batches[-1][0].append(piece)
            batches[-1][1].append(ids[piece])
            tokens += len(ids[piece])
        return batches
