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
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from blockrag.modeling.rotary import RotaryTable
from blockrag.modeling.support import inspect_model
from blockrag.training.contexts import Branch

COMPOSED_ATTENTION = "blockrag_composed"
"""Name in transformers' ``AttentionInterface``. No mask function has it, so transformers builds no mask."""

_MASKED = -1e9
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
    positions: NDArray[np.int64] | None = None
    """Positions of the slots, rising; None: 0, 1, …"""

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
        self.model = model
        self.shape = facts.shape
        self.max_positions = facts.max_positions
        self.width = int(model.get_input_embeddings().weight.shape[1])
        self._pass_tokens = pass_tokens
        self._rotary = RotaryTable(facts.frequencies, facts.attention_scaling, facts.max_positions, model.device)
        self._rotary.phases(facts.max_positions)  # whole at once: threads share it
        model.model.rotary_emb = _IdentityRotary()
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
            block_pass = _BlockPass(self._rotary.phases(rows.shape[1])[: rows.shape[1]], self.shape.num_layers)
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
        table = self._rotary.phases(int(max(batch.positions.max(), batch.slot_positions.max(initial=0))) + 1)
        final_pass = _FinalPass(
            picked.unflatten(0, batch.slots.shape).unbind(2),
            slot_phases=table[torch.from_numpy(batch.slot_positions).to(device)],
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
    """[P, L]; 0 where a row has fewer."""
    slot_positions: NDArray[np.int64]
    """[P, L]"""
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
        slot_positions = np.zeros((rows, length), np.int64)
        ids = np.zeros((rows, width), np.int64)
        positions = np.zeros((rows, width), np.int64)
        visible = np.zeros((rows, width, length + width), bool)
        visible[:, np.arange(width), length + np.arange(width)] = True
        predicts, targets, branches = [], [], []
        for row, (prompt, first) in enumerate(zip(prompts, first_branches, strict=True)):
            used = len(prompt.slots)
            slots[row, :used] = prompt.slots
            slot_positions[row, :used] = np.arange(used) if prompt.positions is None else prompt.positions
            asked_at = int(slot_positions[row, used - 1]) + 1 if used else 0
            at = 0
            for number, branch in enumerate(prompt.branches):
                tokens = [*branch.prompt, *branch.answer]
                end, answer_at = at + len(tokens), at + len(branch.prompt)
                ids[row, at:end] = tokens
                positions[row, at:end] = asked_at + np.arange(len(tokens))
                visible[row, at:end, :used] = True
                visible[row, at:end, length + at : length + end] |= np.tri(len(tokens), dtype=bool)
                predicts.append(row * width + np.arange(answer_at - 1, end - 1))
                targets.append(np.asarray(branch.answer, np.int64))
                branches.append(np.full(len(branch.answer), first + number, np.int64))
                at = end
        return cls(
            slots=slots,
            slot_positions=slot_positions,
            input_ids=ids,
            positions=positions,
            visible=visible,
            predicts=np.concatenate(predicts),
            targets=np.concatenate(targets),
            branches=np.concatenate(branches),
        )


class _Composition(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor: ...


class _BlockPass:
    """Attention of a pass over padded blocks, which keeps K and V. Padding stands at the end, where none sees it."""

    def __init__(self, phases: Tensor, layers: int) -> None:
        """``phases`` [T, head_dim / 2]."""
        self._phases = phases
        self._layers = layers
        self._kept: dict[int, Tensor] = {}

    def kept(self) -> Tensor:
        """What was kept of all rows: [B * T, 2 * layers, kv_heads, head_dim]."""
        parts = [self._kept[number].transpose(1, 2) for number in range(2 * self._layers)]
        return torch.stack(parts, dim=2).flatten(0, 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self._kept[layer], self._kept[self._layers + layer] = key, value
        if layer == self._layers - 1:
            return torch.zeros_like(query)  # what follows the last layer's K and V is read by nobody
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril_()
        return _attention(_rotate(query, self._phases), _rotate(key, self._phases), value, seen[None], scaling)


class _FinalPass:
    """Attention of a pass over branches, which see their prompt's slots."""

    def __init__(self, slots: tuple[Tensor, ...], slot_phases: Tensor, phases: Tensor, visible: Tensor) -> None:
        """``slots``: K of every layer, then V, each [P, L, kv_heads, head_dim]; ``slot_phases`` [P, L, head_dim / 2],
        ``phases`` [P, F, head_dim / 2], ``visible`` [P, F, L + F] bool."""
        self._slots = slots
        self._slot_phases = slot_phases
        self._phases = phases
        self._visible = visible

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        cached_key = self._slots[layer].transpose(1, 2)
        cached_value = self._slots[len(self._slots) // 2 + layer].transpose(1, 2)
        phases = self._phases.unsqueeze(1)
        rotated = _rotate(cached_key, self._slot_phases.unsqueeze(1)).to(key.dtype)
        keys = torch.cat([rotated, _rotate(key, phases)], dim=2)
        values = torch.cat([cached_value.to(value.dtype), value], dim=2)
        return _attention(_rotate(query, phases), keys, values, self._visible, scaling)


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """query [B, heads, T, d], key and value [B, kv_heads, N, d], ``visible`` [B or 1, T, N]; gives [B, heads, T, d].

    On a CPU two plain products and a softmax take half the time of torch's fused attention, backward pass included;
    the heads of a group stand side by side, so that K and V are not repeated.
    """
    with torch.autocast(query.device.type, enabled=False):
        if query.device.type != "cpu":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=visible.unsqueeze(1), scale=scaling, enable_gqa=True
            )
        rows, heads, tokens, head_dim = query.shape
        group = heads // key.shape[1]
        grouped = (query * scaling).reshape(rows, key.shape[1], group * tokens, head_dim)
        scores = torch.matmul(grouped, key.transpose(2, 3)).unflatten(2, (group, tokens))
        mask = torch.zeros(visible.shape, dtype=scores.dtype).masked_fill_(~visible, _MASKED)
        weights = torch.softmax(scores + mask[:, None, None], dim=-1)
        return torch.matmul(weights.flatten(2, 3), value).view(rows, heads, tokens, head_dim)


class _Rotate(torch.autograd.Function):
    """Rotation by phases; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, phases: Tensor) -> Tensor:
        ctx.save_for_backward(phases)
        return _turn(states, phases)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (phases,) = ctx.saved_tensors
        return _turn(gradients[0], phases.conj()), None


def _turn(states: Tensor, phases: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    wide = states.float()
    turned = torch.complex(wide[..., :half], wide[..., half:]) * phases
    return torch.cat([turned.real, turned.imag], dim=-1).to(states.dtype)


def _rotate(states: Tensor, phases: Tensor) -> Tensor:
    """``states`` [..., head_dim] in the model's order, rotated by ``phases`` [..., head_dim / 2] (complex)."""
    rotated: Tensor = _Rotate.apply(states, phases)  # type: ignore[no-untyped-call]
    return rotated


class _IdentityRotary(nn.Module):
    """Rotates nothing, and leaves queries and keys in the type that autocast gave them."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        one = torch.ones(1, 1, 1, dtype=dtype, device=device)
        return one, torch.zeros_like(one)


def composed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    composition: _Composition,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, heads, T, d], key and value [B, kv_heads, T, d] to [B, T, heads, d]."""
    attended = composition.attend(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(COMPOSED_ATTENTION, composed_attention)
