"""How much of a prompt passages may take, and which of them fit: by retrieval score, the rest is dropped.

Without compression that is the whole plan. With it, ``expansion`` goes on chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

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


_WHOLE = " (the bundle has no chunk encoder: passages are read whole or not at all)"


def whole_passages(
    passage_tokens: Sequence[int], kind: Literal["rate", "max_context_tokens"], limit: float, budget_tokens: int
) -> list[PassageDecision]:
    """What becomes small without a chunk encoder: passages are taken best first, and the rest left out.

    A rate keeps the best passage in any case.
    """
    wanted = int(limit) if kind == "max_context_tokens" else int(sum(passage_tokens) / limit)
    if kind == "rate" and passage_tokens:
        wanted = max(wanted, passage_tokens[0])
    decisions = expand_what_fits(passage_tokens, min(wanted, budget_tokens))
    return [
        decision if decision.in_prompt else replace(decision, dropped_reason=decision.dropped_reason + _WHOLE)
        for decision in decisions
    ]


def expand_what_fits(
    passage_tokens: Sequence[int], budget_tokens: int, *, compressed: bool = False
) -> list[PassageDecision]:
    """Takes passages, best first, while they fit; a passage that does not fit is dropped with the reason.

    ``passage_tokens`` holds the tokens of each candidate's block, or the slots that it takes ``compressed``. A smaller
    passage further down may still fit after a larger one was dropped: the budget is used rather than the order kept.
    """
    decisions = []
    left = budget_tokens
    for tokens in passage_tokens:
        if tokens <= left:
            left -= tokens
            decisions.append(PassageDecision(in_prompt=True))
        else:
            how = " even compressed" if compressed else ""
            reason = f"over the token budget: needs {tokens}{how}, {left} of {budget_tokens} left"
            decisions.append(PassageDecision(in_prompt=False, dropped_reason=reason))
    return decisions
