"""How a model of transformers comes to a ``SlotAttention``, and the attention to its batch."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from blockrag.modeling.attention.base import RaggedBatch, SlotAttention

BATCH: ContextVar[RaggedBatch] = ContextVar("batch of the forward pass")
"""Not an argument of the forward pass: some models hand none on to their attention."""


def register(attention: SlotAttention) -> str:
    """The name under which transformers knows it. No mask function has it, so transformers builds no mask."""
    name = f"blockrag_{getattr(attention, '__name__', type(attention).__name__)}"

    def of_the_batch(*states: Any, **options: Any) -> tuple[Tensor, None]:
        return attention(*states, **options, slot_batch=BATCH.get())

    AttentionInterface.register(name, of_the_batch)
    return name
