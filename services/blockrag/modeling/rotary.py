"""Rotary position embedding over slots: keys are kept before rotation and turned by the place they get.

A rotated pair of head dimensions is held as one complex number, so that rotating by position p is one multiplication
by ``exp(i p w_j)``. Which dimensions make a pair is the model's: ``(x_j, x_{j + d/2})`` or neighbours. Reordering the
head dimensions of queries and keys alike leaves every score unchanged, so keys and queries stay in *pair order* (each
pair side by side) everywhere: in block KV, in resident blocks and in a sequence's rotated keys. A dimension that the
model does not rotate has the frequency 0. Values keep the model's order.

Source: RoFormer (arXiv 2104.09864, equation 34); position re-encoding as in Block-Attention (arXiv 2409.15355,
section 2.2), without the un-rotation because nothing was rotated before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


class IdentityRotary(nn.Module):
    """Stands where a model's rotary module was: cos = 1, sin = 0, so that the model itself rotates nothing."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self._rotary = [rotary]  # in a list, so that it is no part of the model any more
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor | None = None, *which: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """What the module gives for position 0, [1, 1, rotated dimensions]; it broadcasts over every position."""
        key = (which, *named.items(), hidden_states.dtype, hidden_states.device)
        if key not in self._known:
            origin = torch.zeros(1, 1, dtype=torch.long, device=hidden_states.device)
            cosine, sine = self._rotary[0](hidden_states[:1, :1], origin, *which, **named)
            self._known[key] = (torch.ones_like(cosine), torch.zeros_like(sine))
        return self._known[key]


@dataclass(frozen=True)
class Rotation:
    """How a layer rotates its queries and keys."""

    head_dim: int
    frequencies: tuple[float, ...] = ()
    """Of the rotated pairs, the first ones of a head; none where a layer has no positions of its own."""
    scaling: float = 1.0
    """Factor on rotated queries and keys (yarn)."""
    neighbours: bool = False
    """Whether dimensions 2j and 2j + 1 are a pair; else j and j + n, of n pairs."""

    @property
    def plain(self) -> bool:
        """Whether whole heads are rotated, by halves."""
        return not self.neighbours and 2 * len(self.frequencies) == self.head_dim

    @cached_property
    def order(self) -> Tensor:
        """Index of the model's head dimension that stands at each place of the pair order."""
        rotated = 2 * len(self.frequencies)
        if self.neighbours:
            return torch.arange(self.head_dim)
        return torch.cat([torch.arange(rotated).view(2, -1).T.reshape(-1), torch.arange(rotated, self.head_dim)])

    def phases(self, positions: Tensor) -> Tensor:
        """The rotations of some positions [n], complex64 [n, head_dim / 2]."""
        still = self.head_dim // 2 - len(self.frequencies)
        frequencies = torch.tensor([*self.frequencies, *[0.0] * still], dtype=torch.float32)
        scaling = torch.tensor([*[self.scaling] * len(self.frequencies), *[1.0] * still])
        # float32 angles, as transformers computes them: at far positions the rounding of the angle is then shared
        angles = positions.float()[:, None] * frequencies[None, :]
        return torch.polar(scaling.expand_as(angles).contiguous(), angles)

    def to_pairs(self, states: Tensor) -> Tensor:
        """[..., head_dim] in the model's order to complex64 [..., head_dim / 2]."""
        if self.plain:
            return to_pairs(states)
        return as_pairs(states.float().index_select(-1, self.order.to(states.device)))


class RotaryTable:
    """``scaling * exp(i p w)`` for every position p and frequency w of a rotation; complex64 [positions, head_dim / 2].

    ``scaling`` is part of the table, so queries and keys both carry it, as in transformers. Grows to the longest
    position asked for, up to ``max_positions``.
    """

    def __init__(self, rotation: Rotation, max_positions: int, device: torch.device) -> None:
        self._rotation, self._max_positions, self._device = rotation, max_positions, device
        self._phases = self._build(min(1024, max_positions))

    def phases(self, length: int) -> Tensor:
        """Rotations of positions 0 … length - 1 (at least; callers slice)."""
        if length > self._phases.shape[0]:
            self._phases = self._build(min(self._max_positions, max(length, 2 * self._phases.shape[0])))
        return self._phases

    def _build(self, length: int) -> Tensor:
        return self._rotation.phases(torch.arange(length)).to(self._device)


class LayerRotaries:
    """The rotation of every layer."""

    def __init__(self, rotations: Sequence[Rotation], max_positions: int, device: torch.device) -> None:
        self.rotations = tuple(rotations)
        distinct = list(dict.fromkeys(rotations))
        self._tables = [RotaryTable(rotation, max_positions, device) for rotation in distinct]
        self._of_layer = [distinct.index(rotation) for rotation in rotations]
        alike = [list(numbers) for _, numbers in groupby(range(len(rotations)), key=rotations.__getitem__)]
        self.runs = tuple((run[0], run[-1] + 1) for run in alike)
        """First layer and end of neighbouring layers that rotate alike."""

    def phases(self, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """For each layer the rotations of positions first … end - 1 of each span, complex64 [sum, head_dim / 2]."""
        longest = max(end for _, end in spans)
        found = []
        for table in self._tables:
            whole = table.phases(longest)
            parts = [whole[first:end] for first, end in spans]
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return tuple(found[number] for number in self._of_layer)


def to_pairs(halves: Tensor) -> Tensor:
    """[..., head_dim] in the order of halves to complex64 [..., head_dim / 2]."""
    half = halves.shape[-1] // 2
    halves = halves.float()
    return torch.complex(halves[..., :half], halves[..., half:])


def pairs_as_real(pairs: Tensor) -> Tensor:
    """Complex [..., head_dim / 2] as float32 [..., head_dim] in pair order; a view."""
    return torch.view_as_real(pairs).flatten(-2)


def rotate_into(out: Tensor, keys: Tensor, phases: Tensor) -> None:
    """Write ``keys`` (pair order, [..., n, head_dim]), rotated by ``phases`` (complex [n, head_dim / 2]).

    ``out`` may be ``keys`` itself.
    """
    if keys.dtype == torch.float32 and out.dtype == torch.float32:
        torch.mul(as_pairs(keys), phases, out=as_pairs(out))
    else:
        out.copy_(pairs_as_real(as_pairs(keys.float()) * phases))


def as_pairs(keys: Tensor) -> Tensor:
    """float32 [..., head_dim] in pair order as complex64 [..., head_dim / 2]; a view."""
    return torch.view_as_complex(keys.view(*keys.shape[:-1], -1, 2))
