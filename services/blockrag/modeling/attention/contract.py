"""What an attention over slot lists must do.

Queries, keys and values of one ragged batch arrive **before** rotation; each segment's token i stands at position
``segment.first_position + i``, and each layer rotates in its own way; the segment's keys and values go to the end of
its slot list (or, when a block is encoded, to the capture); each token attends to all earlier slots of its own list and
to its own segment up to itself, or in a layer with a window to the last so many of these; scores use the rotated
queries and keys. Nothing crosses segments. In the last layer only each segment's last token is read, so an
implementation may leave the others' outputs undefined but finite.

``SlotAttention`` is all of that, a function that transformers calls; ``SlotModel`` takes any. The one there is
(``over_lists``) gathers nothing: keys were rotated when they were placed, so a step rotates only its own tokens. A
paged one, which rotates while it reads, fits beside it. ``Attend`` is its inner part, for one list, of which there are
two: the compiled kernel, and torch's own, which is the reference and takes everything.
Where a window cuts through a segment, or scores are bounded, ``masked`` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from blockrag.modeling.rotary import Rotation
from blockrag.modeling.slots import SequenceState


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a ragged batch that belong to one slot list."""

    start: int
    length: int
    state: SequenceState | None
    """The slot list that they extend; None: a block of its own, at positions 0 …"""

    @property
    def first_slot(self) -> int:
        """Place of its first token in the slot list."""
        return 0 if self.state is None else self.state.num_slots

    @property
    def first_position(self) -> int:
        """Position of its first token."""
        return 0 if self.state is None else self.state.first_position + self.state.num_slots


@dataclass(frozen=True)
class Capture:
    """Where an encode pass leaves K before rotation (pair order) and V; [layers, kv_heads, tokens, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """What one forward pass attends with."""

    segments: tuple[Segment, ...]
    rotations: tuple[Rotation, ...]
    """How each layer rotates."""
    phases: tuple[Tensor, ...]
    """For each layer the rotation of every token of the batch, complex64 [tokens, 1, head_dim / 2]."""
    last_layer: int
    """Number of the layer after which only each segment's last token is read; beyond the last one: all are read."""
    capture: Capture | None = None


def segments_of(items: Sequence[tuple[SequenceState | None, int]]) -> tuple[Segment, ...]:
    """The segments of a batch that has these states' tokens, so many each, one behind the other."""
    segments, start = [], 0
    for state, length in items:
        segments.append(Segment(start=start, length=length, state=state))
        start += length
    return tuple(segments)


class SlotAttention(Protocol):
    """An attention function of transformers that does what this module says."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        slot_batch: RaggedBatch,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:
        """From query [1, heads, T, d], key and value [1, kv_heads, T, d] to [1, T, heads, d], of T tokens.

        ``module`` has the layer's number as ``layer_idx``; ``scaling`` is of the scores,
        which ``softcap`` bounds: to ``softcap * tanh(score / softcap)``; ``sliding_window`` is how many slots back a
        token sees, itself included.
        """
        ...


class Attend(Protocol):
    """Attention over one slot list."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> bool:
        """Attention of the last n of ``total`` slots to all before and to themselves, into ``out``.

        ``query`` and ``out`` [n, heads, d], ``keys`` and ``values`` [kv_heads, ≥ total, d], all rotated; what stands
        beyond ``total`` is finite. False: another must do it, because this one is not for such tensors or would not be
        exact here; ``out`` is undefined then.
        """
        ...
