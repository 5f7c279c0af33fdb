"""The proxy task: n random tokens, and the same once more; who reads the context can copy.

::

    full mask, as published     [first copy | second copy]
    block mask                  [random block] [first copy] [random block] … | [second copy]

Under the block mask the second copy is the final block, which attends to everything, and the first is one of several
passage blocks, in a place drawn per sample. The random blocks are needed: with the two copies alone, block-diagonal
causal attention whose last block sees everything *is* causal attention. So detection under the full mask can also run
on the same prompts (``distractors`` > 0), to tell what the mask changes from what the longer prompt changes.

Source: PEAR (arXiv 2409.19745), §3.1. A sample's tokens are drawn without replacement, so that each token names one
place; the published code draws with replacement from a vocabulary so large that it seldom matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockrag.errors import InvalidRequestError
from blockrag.modeling.pear_record import Mask


@dataclass(frozen=True)
class ProxyTask:
    """Prompts of one size under one mask."""

    n: int
    """Tokens of a copy."""
    mask: Mask = "full"
    distractors: int = 0
    """Blocks of n random tokens around the first copy."""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InvalidRequestError("n", f"{self.n} tokens per copy; at least 2 are needed to copy one")
        if self.distractors < 0 or (self.mask == "block" and self.distractors == 0):
            raise InvalidRequestError(
                "distractors", f"{self.distractors}; the block mask differs from the full one from 1 on"
            )

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return (self.distractors + 2) * self.n

    def draw(self, samples: int, candidates: Tensor, generator: torch.Generator) -> Tensor:
        """Prompts of tokens out of ``candidates`` (int64 [any], each once): int64 [samples, length], on the CPU.

        The last n of a row are the second copy. Raises InvalidRequestError when there are too few candidates.
        """
        needed = (self.distractors + 1) * self.n
        if len(candidates) < needed:
            raise InvalidRequestError(
                "n",
                f"a prompt needs {needed} different tokens, where the vocabulary has {len(candidates)} to draw from",
            )
        order = torch.rand(samples, len(candidates), generator=generator).topk(needed, dim=1).indices
        blocks = candidates[order].view(samples, self.distractors + 1, self.n)
        place = torch.randint(self.distractors + 1, (samples,), generator=generator)
        first = blocks[torch.arange(samples), place]
        return torch.cat([blocks.flatten(1), first], dim=1)

    def blocks(self, tokens: Tensor) -> Sequence[Tensor]:
        """Cut prompts, [samples, length], into what attends only inside itself, and the second copy last."""
        before = tokens[:, : -self.n]
        passages = before.split(self.n, dim=1) if self.mask == "block" else (before,)
        return (*passages, tokens[:, -self.n :])


def ordinary_tokens(vocab_size: int, special: Sequence[int] = ()) -> Tensor:
    """Ids that prompts may be drawn from: all but the special ones, int64 [at most vocab_size]."""
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[[token for token in special if 0 <= token < vocab_size]] = False
    return allowed.nonzero()[:, 0]
