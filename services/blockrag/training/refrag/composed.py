"""Composed prompts, differentiable: the computation of ``modeling.model.SlotModel`` as training needs it.

Block passes read each block alone, at positions of its own, and keep K before rotation and V of every layer: of its
tokens (``encode``) or of one embedding per chunk (``encode_embeddings``). What they kept is a ``SlotBank``. A final
pass reads questions whose slot lists are picked from a bank, in any order and number: slot i is rotated by its
position in the list, as REFRAG (arXiv 2509.01092) with composable block KV wants it. Gradients flow from the final
pass through the slots into the block passes; under ``torch.no_grad`` one bank serves any number of masks.

Works with every model that ``modeling.support`` accepts: its rotary module is replaced by the identity and its
attention goes through transformers' ``AttentionInterface``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.measuring import measure_rotations
from blockrag.modeling.rotary import RotaryTable
from blockrag.modeling.support import inspect_model, rotary_modules
from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.composed_attention import COMPOSED_ATTENTION, BlockPass, FinalPass, UntouchedRotary

_PADDING_SHARE = 0.85
"""A pass takes blocks at least this long, as a share of its longest: the rest would be padding."""


@dataclass(frozen=True)
class SlotBank:
    """What block passes kept, and where each block's slots are in it."""

    slots: Tensor
    """[S, 2 * layers, kv_heads, head_dim]: K before rotation of every layer, in the model's order of head dimensions,
    then V of every layer. Some slots are padding and belong to no block."""
    spans: tuple[tuple[int, int], ...]
    """First slot and number of slots of each block."""

    def block(self, number: int) -> NDArray[np.int64]:
        """Numbers of the slots of a block, in order."""
        start, length = self.spans[number]
        return np.arange(start, start + length)

    @staticmethod
    def join(banks: Sequence[SlotBank]) -> SlotBank:
        """One bank with the blocks of all, in order."""
        offsets = np.cumsum([0, *(len(bank.slots) for bank in banks)])
        spans = tuple(
            (int(offset) + start, length)
            for offset, bank in zip(offsets, banks, strict=False)
            for start, length in bank.spans
        )
        return SlotBank(torch.cat([bank.slots for bank in banks]), spans)


@dataclass(frozen=True)
class ComposedPrompt:
    """A slot list and what is read behind it. Each branch sees the slots and itself, not the other branches."""

    slots: NDArray[np.int64]
    """Numbers of slots of a bank, in the prompt's order."""
    branches: tuple[Branch, ...]
    """Questions with their answers; their positions start after the slots', as if each stood there alone."""

    @property
    def tokens(self) -> int:
        """Tokens of all branches."""
        return sum(len(branch.prompt) + len(branch.answer) for branch in self.branches)


@dataclass(frozen=True)
class FinalStates:
    """Last hidden states where answer tokens are predicted, N of them, in the order of prompts and branches."""

    hidden: Tensor
    """[N, width], after the last norm."""
    targets: Tensor
    """[N] int64: the token to be predicted."""
    branches: Tensor
    """[N] int64: number of the branch, counted through the prompts."""


class ComposedDecoder(nn.Module):
    """A causal language model that reads compositions."""

    def __init__(self, model: PreTrainedModel, *, pass_tokens: int = 2048) -> None:
        """Take ``model`` over: its rotary module and its attention are replaced.

        ``pass_tokens`` bounds the tokens of one forward pass, padding included, where more than one row makes it.
        Raises UnsupportedModelError for a model that cannot be driven over slots.
        """
        super().__init__()
        facts = inspect_model(model)
        rotations = set(measure_rotations(model, facts))
        rotation = rotations.pop()
        if rotations or not rotation.plain or facts.softcap is not None:
            raise UnsupportedModelError(
                f"{facts.name}: compression is trained for models that rotate whole heads, by halves, alike in every "
                "layer, and do not bound attention scores"
            )
        self.model = model
        self.shape = facts.shape
        self.max_positions = facts.plain_positions
        self.width = int(model.get_input_embeddings().weight.shape[1])
        self._pass_tokens = pass_tokens
        self._rotary = RotaryTable(rotation, self.max_positions, model.device)
        self._rotary.phases(self.max_positions)  # whole at once: threads share it
        for path in rotary_modules(model):
            model.set_submodule(path, UntouchedRotary())
        model.set_attn_implementation(COMPOSED_ATTENTION)

    @property
    def head(self) -> Tensor:
        """Weight of the output layer, [vocabulary, width]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def encode(self, blocks: Sequence[Sequence[int]]) -> SlotBank:
        """Slots of token blocks: one per token. Each block attends causally inside itself, at positions 0, 1, …"""
        return self._block_passes([torch.tensor(block, dtype=torch.long) for block in blocks])

    def encode_embeddings(self, blocks: Sequence[Tensor]) -> SlotBank:
        """Slots of blocks given as input embeddings [m, width], one slot per embedding."""
        return self._block_passes(blocks)

    def final(self, bank: SlotBank, prompts: Sequence[ComposedPrompt]) -> FinalStates:
        """Read the branches of ``prompts``; each slot is rotated by its position in its prompt."""
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].slots))
        starts = np.cumsum([0, *(len(prompt.branches) for prompt in prompts)])
        hidden, targets, branches = [], [], []
        for chosen in self._final_batches(prompts, order):
            batch = _FinalBatch.pack([prompts[number] for number in chosen], [int(starts[n]) for n in chosen])
            states = self._final_pass(bank, batch)
            places = torch.from_numpy(batch.predicts)
            hidden.append(states.flatten(0, 1).index_select(0, places.to(states.device)))
            targets.append(batch.targets)
            branches.append(batch.branches)
        numbers = np.concatenate(branches)
        sorting = np.argsort(numbers, kind="stable")
        return FinalStates(
            hidden=torch.cat(hidden).index_select(0, torch.from_numpy(sorting).to(self.device)),
            targets=torch.from_numpy(np.concatenate(targets)[sorting]).to(self.device),
            branches=torch.from_numpy(numbers[sorting]).to(self.device),
        )

    def logits(self, states: FinalStates) -> Tensor:
        """Logits [N, vocabulary] float32 of final states."""
        logits: Tensor = self.model.get_output_embeddings()(states.hidden)
        return logits.float()

    def answer_losses(self, bank: SlotBank, prompts: Sequence[ComposedPrompt]) -> Tensor:
        """Nats of each branch's whole answer, the end token included, float32 [branches]."""
        states = self.final(bank, prompts)
        losses = F.cross_entropy(self.logits(states), states.targets, reduction="none")
        count = sum(len(prompt.branches) for prompt in prompts)
        return torch.zeros(count, device=losses.device).index_add(0, states.branches, losses)

    def _block_passes(self, blocks: Sequence[Tensor]) -> SlotBank:
        order = sorted(range(len(blocks)), key=lambda number: len(blocks[number]))
        spans: list[tuple[int, int]] = [(0, 0)] * len(blocks)
        kept: list[Tensor] = []
        at = 0
        for chosen in self._block_batches([len(blocks[number]) for number in order], order):
            rows = pad_sequence([blocks[number] for number in chosen], batch_first=True).to(self.device)
            block_pass = BlockPass(self._rotary.phases(rows.shape[1])[: rows.shape[1]], self.shape.num_layers)
            if rows.ndim == 2:
                self._run(input_ids=rows, composition=block_pass)
            else:
                embedded = rows.to(self.model.get_input_embeddings().weight.dtype)
                self._run(inputs_embeds=embedded, composition=block_pass)
            kept.append(block_pass.kept())
            for row, number in enumerate(chosen):
                spans[number] = (at + row * rows.shape[1], len(blocks[number]))
            at += rows.shape[0] * rows.shape[1]
        if not kept:
            shape = (0, 2 * self.shape.num_layers, self.shape.num_kv_heads, self.shape.head_dim)
            return SlotBank(torch.empty(shape, device=self.device), ())
        return SlotBank(kept[0] if len(kept) == 1 else torch.cat(kept), tuple(spans))

    def _final_pass(self, bank: SlotBank, batch: _FinalBatch) -> Tensor:
        device = self.device
        picked = bank.slots.index_select(0, torch.from_numpy(batch.slots.reshape(-1)).to(device))
        length = batch.slots.shape[1]
        table = self._rotary.phases(max(length, int(batch.positions.max()) + 1))
        final_pass = FinalPass(
            picked.unflatten(0, batch.slots.shape).unbind(2),
            slot_phases=table[:length],
            phases=table[torch.from_numpy(batch.positions).to(device)],
            visible=torch.from_numpy(batch.visible).to(device),
        )
        return self._run(input_ids=torch.from_numpy(batch.input_ids).to(device), composition=final_pass)

    def _run(self, **inputs: Any) -> Tensor:
        states: Tensor = self.model.model(use_cache=False, **inputs).last_hidden_state
        return states

    def _block_batches(self, lengths: Sequence[int], order: Sequence[int]) -> Iterator[Sequence[int]]:
        """``order``, which goes from short to long, cut into batches that are about equally long."""
        start = 0
        for end in range(1, len(order) + 1):
            if end < len(order):
                wider = (end + 1 - start) * lengths[end] <= self._pass_tokens
                if wider and lengths[start] >= _PADDING_SHARE * lengths[end]:
                    continue
                # a batch of its own costs more than the padding of a few short rows
                if wider and (end - start) * lengths[end] <= self._pass_tokens // 8:
                    continue
            yield order[start:end]
            start = end

    def _final_batches(self, prompts: Sequence[ComposedPrompt], order: Sequence[int]) -> Iterator[Sequence[int]]:
        """The same for prompts: bounded are the slots and the tokens of a batch."""
        batch: list[int] = []
        for number in order:
            rows = [*batch, number]
            slots = len(rows) * max(len(prompts[n].slots) for n in rows)
            tokens = len(rows) * max(prompts[n].tokens for n in rows)
            short = len(prompts[rows[0]].slots) < 0.5 * len(prompts[number].slots)
            full = tokens > self._pass_tokens // 2 or slots > 4 * self._pass_tokens
            if batch and (full or (short and slots > self._pass_tokens // 2)):
                yield batch
                rows = [number]
            batch = rows
        if batch:
            yield batch


@dataclass(frozen=True)
class _FinalBatch:
    """Prompts as rows: P rows of F tokens over L slots."""

    slots: NDArray[np.int64]
    """[P, L], of which slot i stands at position i; 0 where a row has fewer."""
    input_ids: NDArray[np.int64]
    """[P, F]; padding is 0."""
    positions: NDArray[np.int64]
    """[P, F]"""
    visible: NDArray[np.bool_]
    """[P, F, L + F]: which slots and tokens a token sees. Padding sees itself."""
    predicts: NDArray[np.int64]
    """[N]: places, in the flattened rows, that predict an answer's token."""
    targets: NDArray[np.int64]
    """[N]"""
    branches: NDArray[np.int64]
    """[N]"""

    @classmethod
    def pack(cls, prompts: Sequence[ComposedPrompt], first_branches: Sequence[int]) -> _FinalBatch:
        rows = len(prompts)
        length = max(len(prompt.slots) for prompt in prompts)
        width = max(prompt.tokens for prompt in prompts)
        slots = np.zeros((rows, length), np.int64)
        ids = np.zeros((rows, width), np.int64)
        positions = np.zeros((rows, width), np.int64)
        visible = np.zeros((rows, width, length + width), bool)
        visible[:, np.arange(width), length + np.arange(width)] = True
        predicts, targets, branches = [], [], []
        for row, (prompt, first) in enumerate(zip(prompts, first_branches, strict=True)):
            used = len(prompt.slots)
            slots[row, :used] = prompt.slots
            at = 0
            for number, branch in enumerate(prompt.branches):
                tokens = [*branch.prompt, *branch.answer]
                end, answer_at = at + len(tokens), at + len(branch.prompt)
                ids[row, at:end] = tokens
                positions[row, at:end] = used + np.arange(len(tokens))
                visible[row, at:end, :used] = True
                visible[row, at:end, length + at : length + end] |= np.tri(len(tokens), dtype=bool)
                predicts.append(row * width + np.arange(answer_at - 1, end - 1))
                targets.append(np.asarray(branch.answer, np.int64))
                branches.append(np.full(len(branch.answer), first + number, np.int64))
                at = end
        return cls(
            slots=slots,
            input_ids=ids,
            positions=positions,
            visible=visible,
            predicts=np.concatenate(predicts),
            targets=np.concatenate(targets),
            branches=np.concatenate(branches),
        )
