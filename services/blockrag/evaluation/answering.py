"""Greedy answers of a bundle through the product's own engine core, many questions at a time.

Blocks are encoded once and kept, up to a limit, for the other questions, modes and conditions that show them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from blockrag.evaluation.decoding import BATCH_TOKENS, Job, answer_jobs
from blockrag.evaluation.metrics import normalize
from blockrag.evaluation.pieces import Piece
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.rotary import rotate_into
from blockrag.modeling.slots import ResidentBlock, SequenceState

Mode = Literal["full", "block", "no-reencoding", "none"]
MODES: tuple[Mode, ...] = ("full", "block", "no-reencoding", "none")


@dataclass(frozen=True)
class Prompt:
    """A question and the passages shown with it."""

    passages: tuple[Piece, ...]
    question: str


class SlotReader:
    """Answers prompts with one bundle. Not thread-safe."""

    def __init__(
        self, bundle: Bundle, model: SlotModel, *, max_answer_tokens: int = 64, kept_bytes: int = 2**30
    ) -> None:
        """``kept_bytes``: encoded blocks kept for later calls, the longest unused ones are dropped."""
        self.bundle = bundle
        self._model = model
        self._tokenizer = bundle.load_tokenizer()
        self._max_answer_tokens = max_answer_tokens
        self._kept_bytes = kept_bytes
        self._instruction = bundle.template.instruction_ids(self._tokenizer)
        self._token_ids: dict[Piece | None, list[int]] = {None: self._instruction}
        self._blocks: OrderedDict[Piece | None, ResidentBlock] = OrderedDict()

    def answer(self, prompts: Sequence[Prompt], mode: Mode) -> list[str]:
        """The answers' texts. Raises ``PromptTooLongError`` for a prompt beyond the model's positions."""
        blocks = self._encoded(prompts) if mode in ("block", "no-reencoding") else {}
        jobs = [
            Job(
                slots=sum(len(self._ids(piece)) for piece in prompt.passages),
                fresh=self._fresh_ids(prompt, mode),
                start=partial(self._start, prompt, mode, blocks),
            )
            for prompt in prompts
        ]
        return answer_jobs(self._model, self._tokenizer, jobs, self._max_answer_tokens)

    def is_refusal(self, answer: str) -> bool:
        """Whether an answer is the template's refusal, but for case and punctuation."""
        return normalize(answer) == normalize(self.bundle.template.refusal)

    def _ids(self, piece: Piece | None) -> list[int]:
        if piece is not None and piece not in self._token_ids:
            self._token_ids[piece] = self.bundle.template.passage_ids(self._tokenizer, piece.title, piece.text)
        return self._token_ids[piece]

    def _fresh_ids(self, prompt: Prompt, mode: Mode) -> list[int]:
        """What is prefilled: the final block, and in the modes without cached blocks all before it."""
        final = self.bundle.template.final_ids(self._tokenizer, prompt.question)
        if mode == "full":
            passages = [token for piece in prompt.passages for token in self._ids(piece)]
            return [*self._instruction, *passages, *final]
        return [*self._instruction, *final] if mode == "none" else final

    def _start(
        self, prompt: Prompt, mode: Mode, blocks: dict[Piece | None, ResidentBlock], capacity: int
    ) -> SequenceState:
        if not blocks:
            return self._model.new_sequence([], capacity)
        shown = [blocks[piece] for piece in (None, *prompt.passages)]
        if mode == "block":
            return self._model.new_sequence(shown, capacity)
        return compose_without_reencoding(self._model, shown, capacity)

    def _encoded(self, prompts: Sequence[Prompt]) -> dict[Piece | None, ResidentBlock]:
        """The blocks of all passages of ``prompts``, and of the instruction under None."""
        needed = dict.fromkeys([None, *(piece for prompt in prompts for piece in prompt.passages)])
        missing = sorted((piece for piece in needed if piece not in self._blocks), key=lambda one: len(self._ids(one)))
        while missing:
            batch = [missing.pop()]
            tokens = len(self._ids(batch[0]))
            while missing and tokens + len(self._ids(missing[-1])) <= BATCH_TOKENS:
                batch.append(missing.pop())
                tokens += len(self._ids(batch[-1]))
            names = [str(number) for number in range(len(batch))]
            encoded = self._model.encode([self._ids(piece) for piece in batch], names)
            for piece, block in zip(batch, encoded, strict=True):
                self._blocks[piece] = self._model.to_resident(block)
        found = {}
        for piece in needed:
            self._blocks.move_to_end(piece)
            found[piece] = self._blocks[piece]
        kept = sum(block.nbytes for block in self._blocks.values())
        while kept > self._kept_bytes:
            kept -= self._blocks.popitem(last=False)[1].nbytes
        return found


@torch.inference_mode()
def compose_without_reencoding(model: SlotModel, blocks: Sequence[ResidentBlock], capacity: int) -> SequenceState:
    """A slot list whose keys are rotated by their place inside their own block, every block from position 0.

    What Block-Attention calls "without position re-encoding" (arXiv 2409.15355, section 3.3): the blocks' KV is
    concatenated as each block alone would have had it. Only keys of blocks differ from ``SlotModel.new_sequence``:
    what is appended afterwards, the final block and the answer, goes on from the number of slots as it does there.
    """
    slots = sum(block.num_slots for block in blocks)
    state = model.new_sequence([], slots + capacity)
    for block in blocks:
        start, end = state.num_slots, state.num_slots + block.num_slots
        phases = model.rotary.phases(block.num_slots)[: block.num_slots]
        for layer in range(model.num_layers):
            keys, values = state.layer(layer)
            rotate_into(keys[:, start:end], block.keys[layer], phases)
            values[:, start:end].copy_(block.values[layer])
        state.advance(block.num_slots)
    return state
