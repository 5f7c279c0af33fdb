"""Eight tokens through a model as it is and as it is driven: what is loaded computes the same, or is refused."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.support import ModelFacts

_TOKENS = 8
TOLERANCES = defaultdict(lambda: 6e-2, {torch.float32: 1e-3})
"""Largest difference of logits over slots, as a fraction of the largest, by the slots' type."""
STEP_TOLERANCE = 0.1
"""Of a step in eight bits: rounding of random models' weights costs up to 3 %, another computation 50 % and more."""


def probe_of(facts: ModelFacts) -> list[int]:
    """Token ids that are compared."""
    return [(7 * i + 3) % facts.vocab_size for i in range(min(_TOKENS, facts.max_positions))]


@torch.inference_mode()
def own_logits(model: PreTrainedModel, tokens: list[int], first_position: int) -> Tensor:
    """The stock model's logits of the last of ``tokens``, float32 [vocab]."""
    positions = torch.arange(first_position, first_position + len(tokens), device=model.device)
    inputs = torch.tensor([tokens], device=model.device)
    logits: Tensor = model(input_ids=inputs, position_ids=positions[None], use_cache=False).logits[0, -1]
    return logits.float()


def check_close(name: str, got: Tensor, expected: Tensor, tolerance: float, how: str) -> None:
    """Raise UnsupportedModelError where logits, computed ``how``, are not the model's own, float32 [vocab] both."""
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{name}: logits {how} differ from the model's own by {difference:.1e} of their scale; its attention is of "
            "a kind that is not supported"
        )
