"""Tiny random models with every kind of position embedding: rotary (also with a sliding window), learned, ALiBi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from tests.models import make_tiny_model

VOCAB = 60
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: make_tiny_model("llama", vocab_size=VOCAB, num_hidden_layers=2),
    "qwen2": lambda: make_tiny_model("qwen2", vocab_size=VOCAB, num_hidden_layers=2),
    "windows": lambda: make_tiny_model(
        "qwen2", vocab_size=VOCAB, num_hidden_layers=2, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **_SPECIAL)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            init_std=0.2,
            **_SPECIAL,
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, **_SPECIAL)
    ),
}
KINDS = tuple(_BUILDERS)


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Two layers of four heads, float32, biases that are not zero; equal for equal arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[kind]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
