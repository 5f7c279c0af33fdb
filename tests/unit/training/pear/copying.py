"""A Llama that copies by construction, and may have a head that holds it back.

Token codes of ``_CODE`` numbers stand in three slots of the residual stream: the token's own, the one before it, the
answer. Head 0.1 looks one position back (its query and key are constant, so rotation alone decides) and writes the
code before; head 1.2 finds the place whose code before is the token's own and writes that place's token as the answer:
an induction head. The suppressor, head 1.0, is a copy of 1.2 whose W_O is negative and smaller. All other heads are
small random ones, so that the answer stands in noise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB = 100
SUPPRESSOR = (1, 0)
INDUCTION = (1, 2)
_PREVIOUS = (0, 1)
_NOISE = 0.04
"""Spread of the other heads' weights: the answer stands out without a suppressor, and often not with it."""
_CODE, _HEAD_DIM, _HEADS = 32, 64, 4
_OWN, _BEFORE, _ANSWER = (slice(start, start + _CODE) for start in (0, _CODE, 2 * _CODE))
_ONE = 3 * _CODE
"""Place of a number that is always the same."""
_SLOW = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])
"""Dimensions of a head that rotate by less than a hundredth over a prompt: content is compared there."""


def copying_model(suppression: float = 0.0) -> PreTrainedModel:
    """The model; ``suppression`` is the size of the suppressor's W_O relative to the induction head's."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (_NOISE if "proj" in name else 0.0))
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        codes = torch.nn.functional.normalize(torch.randn(VOCAB, _CODE, generator=generator), dim=1)
        model.model.embed_tokens.weight[:, _OWN] = codes
        model.model.embed_tokens.weight[:, _ONE] = 1.0
        model.lm_head.weight[:, _ANSWER] = 4 * codes
        _look_one_back(model)
        _induce(model, INDUCTION, 1.0)
        if suppression:
            _induce(model, SUPPRESSOR, -suppression)
    return model


def _look_one_back(model: LlamaForCausalLM) -> None:
    query, key, value, output = _projections(model, *_PREVIOUS)
    frequencies = 1e8 ** (-torch.arange(8) / 32)
    # the score of a key d positions back is the sum of cos(frequency * (d - 1)): largest at 1
    query[:8, _ONE], query[32:40, _ONE] = torch.cos(frequencies), -torch.sin(frequencies)
    query *= 6
    key[:8, _ONE] = 1.0
    value[:_CODE, _OWN] = torch.eye(_CODE)
    output[_BEFORE, :_CODE] = torch.eye(_CODE) / 4


def _induce(model: LlamaForCausalLM, place: tuple[int, int], size: float) -> None:
    query, key, value, output = _projections(model, *place)
    query[_SLOW, _OWN] = 8 * torch.eye(_CODE)
    key[_SLOW, _BEFORE] = 2 * torch.eye(_CODE)
    value[:_CODE, _OWN] = torch.eye(_CODE)
    output[_ANSWER, :_CODE] = size * torch.eye(_CODE)


def _projections(model: LlamaForCausalLM, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a head's projections, zeroed: three of [head_dim, width] and W_O's [width, head_dim]."""
    attention = model.model.layers[layer].self_attn
    span = slice(head * _HEAD_DIM, (head + 1) * _HEAD_DIM)
    views = (
        attention.q_proj.weight[span],
        attention.k_proj.weight[span],
        attention.v_proj.weight[span],
        attention.o_proj.weight[:, span],
    )
    for view in views:
        view.zero_()
    query, key, value, output = views
    return query, key, value, output
