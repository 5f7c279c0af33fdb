"""What a policy is rewarded by: a frozen decoder that reads targets behind compositions of captured blocks.

The blocks of a context are read once in both forms; every mask afterwards costs one final pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blockrag.budget import chunk_bounds, expand_at_rate
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.refrag.policy import PolicyInput, make_policy_input
from blockrag.modeling.refrag.policy_features import TokenTraits
from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.chunk_masks import view_slots
from blockrag.training.refrag.composed import ComposedDecoder, ComposedPrompt, SlotBank

Masks = NDArray[np.bool_]
"""[masks, chunks]: one row per mask over the chunks of all passages, true where a chunk is expanded."""


@dataclass(frozen=True)
class CapturedContext:
    """The blocks of a context, read in both forms."""

    passages: tuple[tuple[int, ...], ...]
    """Token ids of the passages' blocks."""
    embeddings: tuple[Tensor, ...]
    """Chunk embeddings of each passage, [m, encoder width]."""
    bank: SlotBank
    """Of the instruction block (where there is one), the full blocks and the compressed blocks."""
    instructed: bool
    chunk_tokens: int

    @property
    def chunks(self) -> int:
        return sum(map(len, self.embeddings))

    @property
    def tokens(self) -> int:
        """Tokens of the passages."""
        return sum(map(len, self.passages))

    def mask_at(self, scores: NDArray[np.float32], rate: float) -> NDArray[np.bool_]:
        """The mask [chunks] of the highest scores at a rate; everything compressed where the rate is k or beyond."""
        return expand_at_rate(scores, [len(passage) for passage in self.passages], self.chunk_tokens, rate)

    def prompt(self, branch: Branch, mask: NDArray[np.bool_]) -> ComposedPrompt:
        """The composed prompt of a mask [chunks], with one question or target behind it."""
        lead = [self.bank.block(0)] if self.instructed else []
        count, first = len(self.passages), len(lead)
        full = [self.bank.block(first + number) for number in range(count)]
        short = [self.bank.block(first + count + number) for number in range(count)]
        masks = np.split(mask, np.cumsum([len(one) for one in short])[:-1])
        return ComposedPrompt(np.concatenate([*lead, *view_slots(full, short, masks, self.chunk_tokens)]), (branch,))

    def without_passages(self, branch: Branch) -> ComposedPrompt:
        """The prompt of the instruction alone."""
        slots = self.bank.block(0) if self.instructed else np.zeros(0, np.int64)
        return ComposedPrompt(slots, (branch,))


class PolicyReader:
    """A bundle's decoder, chunk encoder and projector, frozen. Threads may share it."""

    def __init__(
        self, decoder: ComposedDecoder, compressor: ChunkCompressor, traits: TokenTraits, *, bf16: bool = False
    ) -> None:
        """``bf16``: the decoder computes in bfloat16 (autocast), which doubles its speed where it is supported."""
        self._bf16 = bf16
        self.decoder = decoder.requires_grad_(False)
        self.compressor = compressor
        self.traits = traits

    @classmethod
    def load(cls, bundle: Bundle, device: str | torch.device = "cpu", *, bf16: bool = False) -> PolicyReader:
        """Raises BundleError for a bundle without chunk compression."""
        compressor = ChunkCompressor.load(bundle, device)
        decoder = ComposedDecoder(load_stock_model(bundle, device=device, compute_dtype="float32"))
        return cls(decoder, compressor, TokenTraits.of(bundle.load_tokenizer()), bf16=bf16)

    @torch.no_grad()
    def capture(self, instruction: Sequence[int], passages: Sequence[Sequence[int]]) -> CapturedContext:
        """Read the blocks of a context; ``instruction`` may be empty, passages there are at least one."""
        embeddings = self.compressor.embed(passages)
        opening = [instruction] if instruction else []
        projected = self.compressor.project(embeddings)
        with self._autocast():
            bank = SlotBank.join(
                [self.decoder.encode([*opening, *passages]), self.decoder.encode_embeddings(projected)]
            )
        return CapturedContext(
            passages=tuple(map(tuple, passages)),
            embeddings=tuple(embeddings),
            bank=bank,
            instructed=bool(instruction),
            chunk_tokens=self.compressor.chunk_tokens,
        )

    def see(
        self,
        passages: Sequence[Sequence[int]],
        embeddings: Sequence[Tensor],
        question: Sequence[int],
        ranks: Sequence[int] | None,
    ) -> PolicyInput:
        """What a policy sees of passages and a final block; ``ranks`` as in ``make_policy_input``."""
        return make_policy_input(
            passages,
            embeddings,
            question,
            self.compressor.embed([question])[0] if question else embeddings[0][:0],
            chunk_tokens=self.compressor.chunk_tokens,
            traits=self.traits,
            ranks=ranks,
        )

    @torch.no_grad()
    def losses(self, context: CapturedContext, branch: Branch, masks: Masks) -> Tensor:
        """Nats per target token under each mask, float32 [masks] on the CPU."""
        prompts = [context.prompt(branch, mask) for mask in masks]
        return self.prompt_losses(context, prompts)

    @torch.no_grad()
    def prompt_losses(self, context: CapturedContext, prompts: Sequence[ComposedPrompt]) -> Tensor:
        """Nats per target token of prompts over the context's slots, one branch each; float32 [prompts]."""
        with self._autocast():
            found = self.decoder.answer_losses(context.bank, prompts)
        return found.cpu() / torch.tensor([float(len(prompt.branches[0].answer)) for prompt in prompts])

    @torch.no_grad()
    def divergences(self, context: CapturedContext, branch: Branch, masks: Masks) -> Tensor:
        """How far each mask's predictions are from those of the uncompressed prompt; float32 [masks] on the CPU.

        Kullback-Leibler divergence, nats per target token. It is nearly what ``losses`` lose, without the chance that
        lies in which of the likely tokens the target happens to have.
        """
        prompts = [context.prompt(branch, mask) for mask in (np.ones(context.chunks, dtype=np.bool_), *masks)]
        with self._autocast():
            states = self.decoder.final(context.bank, prompts)
        wanted, *hidden = states.hidden.split(len(branch.answer))
        taught = self._log_probabilities(wanted)
        likely = taught.exp()
        found = [(likely * (taught - self._log_probabilities(rows))).sum(-1).mean() for rows in hidden]
        return torch.stack(found).cpu()

    @torch.no_grad()
    def whole_loss(self, instruction: Sequence[int], passages: Sequence[Sequence[int]], branch: Branch) -> float:
        """Nats per target token where instruction and passages are one block: full attention."""
        block = [*instruction, *(token for passage in passages for token in passage)]
        with self._autocast():
            bank = self.decoder.encode([block])
            found = self.decoder.answer_losses(bank, [ComposedPrompt(bank.block(0), (branch,))])
        return float(found[0]) / len(branch.answer)

    @torch.no_grad()
    def chunk_losses(self, passages: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """How hard each chunk of each passage is to predict: nats per token under the decoder's block pass, [m] each.

        A block's first token, which nothing predicts, is left out; a chunk of it alone has 0.
        """
        tokens = [np.zeros(len(passage)) for passage in passages]
        asked = [number for number, passage in enumerate(passages) if len(passage) > 1]
        if asked:
            bank = SlotBank(self.decoder.encode([]).slots, ())
            empty = np.zeros(0, np.int64)
            branches = [Branch(list(passages[number][:1]), list(passages[number][1:])) for number in asked]
            with self._autocast():
                states = self.decoder.final(bank, [ComposedPrompt(empty, (branch,)) for branch in branches])
                losses = F.cross_entropy(self.decoder.logits(states), states.targets, reduction="none").cpu().numpy()
            ends = np.cumsum([len(branch.answer) for branch in branches])
            for number, own in zip(asked, np.split(losses, ends[:-1]), strict=True):
                tokens[number][1:] = own
        return [self._chunk_means(own) for own in tokens]

    def _chunk_means(self, losses: NDArray[np.float64]) -> NDArray[np.float32]:
        pieces = [losses[max(1, start) : end] for start, end in chunk_bounds(len(losses), self.compressor.chunk_tokens)]
        return np.array([piece.mean() if piece.size else 0.0 for piece in pieces], dtype=np.float32)

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self.decoder.model.get_output_embeddings()(hidden)
        return logits.float().log_softmax(-1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.decoder.device.type, torch.bfloat16, enabled=self._bf16)
