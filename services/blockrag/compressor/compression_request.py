"""What a request asks of compression, checked against what the bundle can do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag.budget import BudgetKind
from blockrag.errors import InvalidRequestError
from blockrag.v1 import common_pb2

if TYPE_CHECKING:
    from blockrag.modeling.bundle import Bundle

RETRIEVAL = "retrieval"
"""The policy that every bundle has: the best passages' chunks first."""
SENTENCES = "sentences"
"""A policy of bundles without a chunk encoder: sentences that share words with the question, of cached blocks."""
_PREFERRED = ("query", "blind")


@dataclass(frozen=True)
class CompressionAbility:
    """What a bundle can compress with."""

    bundle_name: str
    chunk_tokens: int
    """Tokens of a chunk (k): the highest rate."""
    policies: frozenset[str] | None
    """Names of the bundle's own policies; None: the bundle has no chunk encoder. Then a prompt becomes small by leaving
    passages out, or sentences, the worst ones first."""

    @classmethod
    def of(cls, bundle: Bundle) -> CompressionAbility:
        """What ``bundle`` can do."""
        policies = None if bundle.refrag is None else frozenset(bundle.refrag.policies)
        return cls(bundle.name, bundle.chunk_tokens, policies)


@dataclass(frozen=True)
class CompressionRequest:
    """A valid request for compression."""

    kind: BudgetKind
    limit: float
    """In the unit of ``kind``: tokens per slot, slots, milliseconds; nothing of "auto"."""
    policy: str
    """Who chooses the chunks that stay word for word."""

    def to_message(self) -> common_pb2.Compression:
        """The message that reads as this."""
        message = common_pb2.Compression(policy=self.policy)
        if self.kind == "auto":
            message.auto = True
        else:
            setattr(message, self.kind, int(self.limit) if self.kind == "max_context_tokens" else self.limit)
        return message


def read_compression(
    message: common_pb2.Compression, mode: common_pb2.AttentionMode, ability: CompressionAbility
) -> CompressionRequest | None:
    """The request in ``message``; None: nothing is to be compressed.

    Raises ``InvalidRequestError`` naming the field: a value out of range, an unknown policy, an attention mode without
    cached blocks.
    """
    kind = message.WhichOneof("budget")
    if kind is None:
        if message.policy:
            raise InvalidRequestError("compression", "needs one of rate, max_context_tokens, max_ttft_ms and auto")
        return None
    if (mode or common_pb2.ATTENTION_MODE_BLOCK) != common_pb2.ATTENTION_MODE_BLOCK:
        raise InvalidRequestError("compression", "is possible with attention_mode block only")
    if kind == "auto":
        if not message.auto:
            raise InvalidRequestError("compression.auto", "is false: leave it out")
        if message.policy not in ("", RETRIEVAL):
            raise InvalidRequestError("compression.policy", f"is {message.policy!r}; with auto the passages decide")
        return CompressionRequest(kind, 0.0, RETRIEVAL)
    limit = float(getattr(message, kind))
    if kind == "rate" and not 1.0 <= limit <= ability.chunk_tokens:  # refuses NaN as well
        raise InvalidRequestError(
            "compression.rate",
            f"is {limit:g}; must be from 1 to {ability.chunk_tokens}, the tokens of the bundle's chunks",
        )
    if kind == "rate" and limit == 1.0 and not message.policy:
        return None  # everything word for word, as if nothing were said
    if kind == "max_context_tokens" and limit < 1:
        raise InvalidRequestError("compression.max_context_tokens", "must be at least 1")
    if kind == "max_ttft_ms" and not (limit > 0 and math.isfinite(limit)):
        raise InvalidRequestError("compression.max_ttft_ms", "must be a number above 0")
    return CompressionRequest(kind, limit, _policy(message.policy, ability.policies))


def sizes_decide(compression: CompressionRequest | None, ability: CompressionAbility) -> bool:
    """Whether a plan follows from the passages' sizes and order: no policy has a say, and no time is predicted.

    Without compression; with the policy "retrieval"; at the highest rate of a bundle with a chunk encoder, which leaves
    no chunk to expand.
    """
    if compression is None:
        return True
    if compression.kind in ("max_ttft_ms", "auto"):
        return False
    if ability.policies is None:
        return compression.policy == RETRIEVAL
    highest = compression.kind == "rate" and compression.limit >= ability.chunk_tokens
    return highest or compression.policy == RETRIEVAL


def _policy(asked: str, own: frozenset[str] | None) -> str:
    known = frozenset((SENTENCES,)) if own is None else own
    if not asked:
        return next((name for name in _PREFERRED if name in known), RETRIEVAL)
    if asked != RETRIEVAL and asked not in known:
        choices = ", ".join((*sorted(known), RETRIEVAL))
        raise InvalidRequestError("compression.policy", f"is {asked!r}; the bundle has {choices}")
    return asked
