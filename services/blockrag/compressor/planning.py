"""Plans without learned compression: expand what fits, by retrieval score, and drop the rest.

REFRAG (arXiv 2509.01092, section 2) decides chunk by chunk; a plan already speaks in chunks, and here all chunks of a
passage share one fate, because a passage's block KV is cached whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockrag.errors import PromptTooLongError


@dataclass(frozen=True)
class PromptBudget:
    """Tokens that a prompt may have."""

    max_positions: int
    """Most tokens of prompt and answer together."""
    instruction_tokens: int
    final_tokens: int
    answer_tokens: int
    """Tokens left free for the answer."""
    max_context_tokens: int = 0
    """The request's own bound on passage tokens; 0: none."""

    def passage_tokens(self) -> int:
        """Tokens left for passages.

        Raises ``PromptTooLongError`` when question and answer alone do not fit the model.
        """
        fixed = self.instruction_tokens + self.final_tokens + self.answer_tokens
        left = self.max_positions - fixed
        if left < 0:
            raise PromptTooLongError(
                f"question ({self.final_tokens} tokens) and answer ({self.answer_tokens}) do not fit the model's "
                f"{self.max_positions} positions: shorten the question or lower max_tokens"
            )
        return min(left, self.max_context_tokens) if self.max_context_tokens else left


@dataclass(frozen=True)
class PassageDecision:
    """What becomes of one passage."""

    in_prompt: bool
    dropped_reason: str = ""


def expand_what_fits(passage_tokens: Sequence[int], budget_tokens: int) -> list[PassageDecision]:
    """Expands passages, best first, while they fit; a passage that does not fit is dropped with the reason.

    ``passage_tokens`` holds the tokens of each candidate's block. A smaller passage further down may still fit after
    a larger one was dropped: the budget is used rather than the order kept.
    """
    decisions = []
    left = budget_tokens
    for tokens in passage_tokens:
        if tokens <= left:
            left -= tokens
            decisions.append(PassageDecision(in_prompt=True))
        else:
            reason = f"over the token budget: needs {tokens}, {left} of {budget_tokens} left"
            decisions.append(PassageDecision(in_prompt=False, dropped_reason=reason))
    return decisions


def chunk_bounds(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Start and end of each chunk of a block; the last one may be shorter. Covers all tokens in order."""
    return [(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]
