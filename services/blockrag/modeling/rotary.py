"""Rotary position embedding over slots: keys are kept before rotation and turned by the place they get.

A rotated head dimension pair ``(x_j, x_{j + d/2})`` is held as one complex number, so that rotating by position p is
one multiplication by ``exp(i p w_j)``. Reordering the head dimensions of queries and keys alike leaves every score
unchanged, so keys and queries stay in this *pair order* (0, d/2, 1, d/2 + 1, …) everywhere: in block KV, in resident
blocks and in a sequence's rotated keys. Values keep the model's order.

Source: RoFormer (arXiv 2104.09864, equation 34); position re-encoding as in Block-Attention (arXiv 2409.15355,
section 2.2), without the un-rotation because nothing was rotated before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IdentityRotary(nn.Module):
    """Stands where the model's rotary module was: cos = 1, sin = 0, so that the model itself rotates nothing."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pair of scalars, shape [1, 1, 1], that broadcasts over every position."""
        one = hidden_states.new_ones(1, 1, 1)
        return one, torch.zeros_like(one)


class RotaryTable:
    """``attention_scaling * exp(i p w)`` for every position p and frequency w; complex64 [positions, head_dim / 2].

    ``attention_scaling`` (yarn) is part of the table, so queries and keys both carry it, as in transformers. Grows
    to the longest position asked for, up to ``max_positions``.
    """

    def __init__(self, frequencies: Tensor, attention_scaling: float, max_positions: int, device: torch.device) -> None:
        self.frequencies = frequencies.detach().to("cpu", torch.float32)
        self.attention_scaling = float(attention_scaling)
        self.max_positions = max_positions
        self.device = device
        self._phases = self._build(min(1024, max_positions))

    def phases(self, length: int) -> Tensor:
        """Rotations of positions 0 … length - 1 (at least; callers slice)."""
        if length > self._phases.shape[0]:
            self._phases = self._build(min(self.max_positions, max(length, 2 * self._phases.shape[0])))
        return self._phases

    def _build(self, length: int) -> Tensor:
        # float32 angles, as transformers computes them: at far positions the rounding of the angle is then shared
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self.frequencies[None, :]
        return torch.polar(torch.full_like(angles, self.attention_scaling), angles).to(self.device)


def to_pairs(halves: Tensor) -> Tensor:
    """[..., head_dim] in the model's order to complex64 [..., head_dim / 2]."""
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


def pair_order(head_dim: int) -> Tensor:
    """Index of the model's head dimension that stands at each place of the pair order."""
    return torch.arange(head_dim).view(2, -1).T.reshape(-1)
