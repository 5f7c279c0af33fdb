"""What cached blocks must equal, computed with a stock transformers model alone: masks, and passes over chosen slots.

``block_mask`` is the explicit block mask (Block-Attention, arXiv 2409.15355, figure 1): block-diagonal causal, and the
final block sees everything. It is one forward pass. For full and compressed blocks together there is none: A slot was
made inside its own block, at its place there, and is attended to at its place in the prompt. No single forward pass has
two positions for one key, so there are several: one per block, whose cache holds keys *rotated to their place in the
block*, and one of the final block over the chosen slots, whose keys are turned by the difference of the two places. The
served path keeps keys before rotation and turns them once; nothing of it is used here.

Source: REFRAG (arXiv 2509.01092) over Block-Attention (arXiv 2409.15355, section 2.2, whose published code re-rotates
like this).

And two computations compared layer by layer, naming the first layer where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

_DEEPEST = 10**6
"""Depth of what no layer is to blame for."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    max_difference: float
    """Largest absolute difference of the result (logits), or of the hidden states that differ first."""
    tolerance: float
    """Largest difference allowed here: a fraction of the reference's largest value."""
    passed: bool
    first_difference: str
    """Where it first differs, like "layer 3 (encode)", "logits" or "first tokens"; empty when it passed."""
    agreement: float | None = None
    """Share of positions at which the likeliest token is the reference's; None where no tokens are predicted."""
    divergence: float | None = None
    """KL divergence of the predictions from the reference's, mean over positions, in nats."""


@dataclass(frozen=True)
class Limits:
    """What a comparison allows: a few times what the rounding of a type was measured to explain."""

    relative: float
    """Largest difference of the result, as a fraction of the largest reference value."""
    layers: float
    """The same of hidden states, which a norm follows."""
    agreement: float
    """Least share of positions with the same likeliest token."""
    divergence: float
    """Largest KL divergence, mean over positions, in nats."""


FinalPass = tuple[Tensor, Sequence[Tensor]]
"""Logits [vocab] of a pass' last token, and hidden states after each layer, [tokens, width] each."""

EXACT = Limits(relative=0.0, layers=0.0, agreement=1.0, divergence=0.0)
"""To the bit."""


class Difference:
    """Keeps the difference of the result, and of the first layer that differs too much."""

    def __init__(self, limits: Limits, result: str = "logits") -> None:
        """``result`` names what is compared last."""
        self._limits = limits
        self._result = result
        self._first: tuple[int, str, float, float] | None = None
        self._found = (0.0, 0.0)
        self._predictions: tuple[float, float] | None = None

    def compare(self, where: str, depth: int, got: Tensor, expected: Tensor) -> None:
        """Compare what was computed ``where`` (a layer, or the result), ``depth`` layers deep."""
        maximum = float((got.float() - expected.float()).abs().max())
        relative = self._limits.relative if where == self._result else self._limits.layers
        tolerance = relative * max(1e-6, float(expected.float().abs().max()))
        if where == self._result and maximum >= self._found[0]:
            self._found = (maximum, tolerance)
        # NaN compares as false, so the test is for what is allowed
        if not maximum <= tolerance and (self._first is None or depth < self._first[0]):
            self._first = (depth, where, maximum, tolerance)

    def compare_layers(self, got: Sequence[Tensor], expected: Sequence[Tensor], span: slice, suffix: str = "") -> None:
        """Compare hidden states [tokens, width] after each layer of ``got`` with rows ``span`` of ``expected``.

        Of the last of ``expected`` only the last token is compared: ``got`` computes no other.
        """
        for number, states in enumerate(got):
            wanted = expected[number][span]
            if number == len(expected) - 1:
                states, wanted = states[-1:], wanted[-1:]
            self.compare(f"layer {number}{suffix}", number, states, wanted)

    def compare_encoded(
        self, got: Sequence[Tensor], expected: Sequence[Tensor], start: int = 0, what: str = "encode"
    ) -> None:
        """Compare hidden states of a block with those of a pass in which it begins at ``start``."""
        # the last layer's output of a block is never read, so it is not computed
        self.compare_layers(got[:-1], expected, slice(start, start + len(got[0])), f" ({what})")

    def compare_final(self, got: FinalPass, expected: FinalPass) -> None:
        """Compare a final block with the end of ``expected``."""
        (logits, states), (wanted, layers) = got, expected
        self.compare_layers(states, layers, slice(-len(states[0]), None))
        self.compare("logits", len(layers), logits, wanted)

    def compare_predictions(self, got: Tensor, expected: Tensor) -> None:
        """Compare logits [positions, vocab] by what a reader notices: the likeliest tokens, and the probabilities."""
        reference = expected.float().log_softmax(-1)
        divergence = float((reference.exp() * (reference - got.float().log_softmax(-1))).sum(-1).mean())
        agreement = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
        self._predictions = (agreement, divergence)
        for where, allowed in (
            ("first tokens", agreement >= self._limits.agreement),
            ("probabilities", divergence <= self._limits.divergence),
        ):
            if not allowed and self._first is None:
                self._first = (_DEEPEST, where, *self._found)

    def check(self, name: str) -> Check:
        """What was found."""
        predictions = self._predictions or (None, None)
        if self._first is None:
            return Check(name, *self._found, True, "", *predictions)
        _, where, maximum, tolerance = self._first
        return Check(name, maximum, tolerance, False, where, *predictions)


@contextmanager
def traced(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Hidden states after each layer, [tokens, width] each, of the forward pass inside."""
    trace: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        trace.append(hidden[0].clone())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        yield trace


def block_mask(block_lengths: Sequence[int], final_length: int) -> Tensor:
    """Which position may attend to which: bool [1, 1, T, T], T = sum of ``block_lengths`` + ``final_length``.

    Positions are global and contiguous over blocks and the final block.
    """
    if any(length <= 0 for length in block_lengths) or final_length < 0:
        raise ValueError("a block has at least one token")
    total = sum(block_lengths) + final_length
    allowed = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for length in block_lengths:
        end = start + length
        allowed[start:end, start:end] = True
        start = end
    allowed[start:] = True
    return allowed.tril_()[None, None]


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed and the type's least number where not, as transformers takes a 4-D mask."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def stock_mask(model: PreTrainedModel, allowed: Tensor) -> Tensor | dict[str, Tensor]:
    """``allowed`` [1, 1, T, T] as a stock model takes it: one additive mask, or one by the kind of layer.

    A layer with a window sees what is both allowed and in its window.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    allowed = allowed.to(model.device)
    whole = additive_mask(allowed, model.dtype)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return whole
    places = torch.arange(allowed.shape[-1], device=model.device)
    near = additive_mask(allowed & (places > places[:, None] - int(window)), model.dtype)
    masks = {"full_attention": whole, "sliding_attention": near}
    return masks if kinds else near


@dataclass(frozen=True)
class BlockPass:
    """A block alone through the stock model."""

    keys: tuple[Tensor, ...]
    """Of each layer, rotated to positions 0 … n - 1, [kv_heads, n, head_dim]."""
    values: tuple[Tensor, ...]
    """The same shape."""


@dataclass(frozen=True)
class ChosenSlot:
    """One slot of a prompt: slot ``place`` of a block's pass."""

    block: BlockPass
    place: int


@torch.inference_mode()
def pass_block(model: PreTrainedModel, embeddings: Tensor) -> BlockPass:
    """One causal forward pass over input embeddings [n, width] at positions 0 … n - 1."""
    cache = DynamicCache()
    positions = torch.arange(len(embeddings), device=model.device)[None]
    inputs = embeddings.to(model.device, model.dtype)[None]
    model.model(inputs_embeds=inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    return BlockPass(
        keys=tuple(layer.keys[0] for layer in cache.layers), values=tuple(layer.values[0] for layer in cache.layers)
    )


@torch.inference_mode()
def pass_final(model: PreTrainedModel, slots: Sequence[ChosenSlot], final: Sequence[int]) -> Tensor:
    """Logits of every token of ``final``, [n, vocab], over ``slots``, of which the i-th stands at position i."""
    cache = DynamicCache()
    if slots:
        turns = torch.tensor([position - slot.place for position, slot in enumerate(slots)], device=model.device)
        cosine, sine = _turns(model, turns)
        for layer in range(len(slots[0].block.keys)):
            keys = torch.stack([slot.block.keys[layer][:, slot.place] for slot in slots], dim=1)
            values = torch.stack([slot.block.values[layer][:, slot.place] for slot in slots], dim=1)
            cache.update(_turned(keys, cosine, sine)[None], values[None], layer)
    positions = torch.arange(len(slots), len(slots) + len(final), device=model.device)
    seen = torch.arange(len(slots) + len(final), device=model.device)[None] <= positions[:, None]
    output = model(
        input_ids=torch.tensor([list(final)], device=model.device),
        position_ids=positions[None],
        attention_mask=additive_mask(seen, model.dtype)[None, None],
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits[0].float()
    return logits


def _turns(model: PreTrainedModel, turns: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines of ``turns`` positions, which may be negative; [n, head_dim] in float32."""
    rotary = model.model.rotary_emb
    cosine, sine = rotary(torch.zeros(1, device=turns.device), turns[None].float())
    # yarn scales each rotated key, and these were rotated once already
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    return cosine[0] / scaling, sine[0] / scaling


def _turned(keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding as RoFormer's equation 34 has it, over halves; computed in float32."""
    wide = keys.float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cosine + torch.cat([-second, first], dim=-1) * sine
    return turned.to(keys.dtype)
