from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.model import SlotModel
from tests.models import make_tiny_model

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str) -> PreTrainedModel:
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES))
    if kind == "phi":
        return PhiForCausalLM(PhiConfig(**_SIZES))
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**_SIZES))
    if kind == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES))
    if kind == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**_SIZES, num_local_experts=2))
    return CohereForCausalLM(CohereConfig(**_SIZES))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("gpt2", "no decoder with a list of layers at model.layers"),
        ("bloom", "no decoder with a list of layers at model.layers"),
        ("gpt_neox", "no decoder with a list of layers at model.layers"),
        ("phi", "partial rotary"),
        ("gemma2", "softcapping"),
        ("gemma3", "rope_type|rotary"),
        ("gpt_oss", "sinks"),
        ("cohere", "differ from the model's own"),
    ],
)
def test_names_what_a_model_lacks(kind: str, problem: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=problem):
        SlotModel.from_pretrained_model(build(kind).eval())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_refuses_rotary_variants_that_depend_on_the_prompt(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=str(rope["rope_type"])):
        SlotModel.from_pretrained_model(make_tiny_model("llama", rope_parameters=rope))


def test_refuses_a_model_without_rotary_embedding() -> None:
    model = make_tiny_model("llama")
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no rotary position embedding"):
        SlotModel.from_pretrained_model(model)


def test_refuses_a_second_rotary_module() -> None:
    model = make_tiny_model("llama")
    model.model.rotary_emb_local = copy.deepcopy(model.model.rotary_emb)
    with pytest.raises(UnsupportedModelError, match=r"found model\.rotary_emb, model\.rotary_emb_local"):
        SlotModel.from_pretrained_model(model)


def test_refuses_unknown_layer_types() -> None:
    model = make_tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        SlotModel.from_pretrained_model(model)


def test_refuses_an_unknown_cache_type() -> None:
    with pytest.raises(ValueError, match="int8"):
        SlotModel.from_pretrained_model(make_tiny_model("llama"), kv_dtype="int8")
