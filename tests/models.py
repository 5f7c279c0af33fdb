"""Tiny random models, tokenizers and bundles for tests; real parts, made in a fraction of a second.

>>> bundle = load_bundle(make_tiny_bundle(tmp_path / "bundle"))
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from blockrag.corpus.sample import load_articles
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig
from blockrag.modeling.refrag.record import Alignment, Pooling
from blockrag.modeling.refrag.refrag_writing import PolicyPart, write_refrag
from blockrag.modeling.template import PromptTemplate

TINY_VOCAB = 300
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|passage|>", "<|text|>", "<|question|>", "<|answer|>")
"""Special tokens; the place in the list is the id. The end token's id is 2."""
TEST_TEMPLATE = PromptTemplate(
    instruction="<|begin|>",
    passage="<|passage|> {title}<|text|> {text}",
    final="<|question|> {question}<|answer|>",
    answer_prefix=" ",
    end="<|end|>",
    refusal="not in the passages",
)
"""Of tiny bundles. The leading spaces give a word the same tokens wherever it stands."""

_SIZES: dict[str, Any] = {
    "vocab_size": TINY_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}
_FAMILIES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(_FAMILIES)


def make_tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family ("llama", "mistral", "qwen2", "qwen3"), float32, equal for equal arguments.

    Weights are large enough that logits depend on position and order. ``overrides`` go to the configuration.
    """
    config_type, model_type = _FAMILIES[family]
    config = config_type(**{**_SIZES, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_type(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ``SPECIAL_TOKENS`` and ``TINY_VOCAB`` tokens: every text can be written with it."""
    texts = ["the capital of the country is the largest city of the land", "it was founded in the year when there was"]
    return _learn_tokenizer(texts * 4, TINY_VOCAB)


def _learn_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


def make_tiny_checkpoint(path: Path, *, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A Hugging Face checkpoint directory with a tokenizer."""
    make_tiny_model(family, seed=seed, **overrides).save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return path


def make_tiny_bundle(path: Path, *, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A whole bundle with ``TEST_TEMPLATE`` at ``path``, which must not exist; returns ``path``."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "checkpoint", family=family, seed=seed, **overrides)
        create_bundle(checkpoint, path, TEST_TEMPLATE, name="tiny", passage_tokens=64)
    return path


def make_small_bundle(path: Path, seed: int = 0) -> Path:
    """A random bundle for what a tiny one is too small for, at ``path``; returns ``path``.

    6 million parameters, 16,384 positions, and a vocabulary learnt from the sample corpus, in which a word is about
    one token. Greedy answers go on to their limit: the token that ends one is never the likeliest.
    """
    tokenizer = _learn_tokenizer([article.text for article in load_articles()], 8192)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 16_384,
        "initializer_range": 0.1,
    }
    model = make_tiny_model(seed=seed, **sizes)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        create_bundle(folder, path, TEST_TEMPLATE, name="small", chunk_tokens=8)
    return path


def make_tiny_refrag_bundle(
    path: Path,
    *,
    chunk_tokens: int = 4,
    alignment: Alignment = "tokens",
    pooling: Pooling = "mean",
    policies: tuple[str, ...] = ("query", "blind"),
    family: str = "llama",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """A bundle that compresses chunks, with random parts, at ``path``; returns ``path``.

    Projected chunk embeddings are as large as the decoder's own. Of ``policies``, "query" sees the question.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = load_bundle(make_tiny_bundle(Path(folder) / "plain", family=family, seed=seed, **overrides))
        if alignment == "tokens":
            encoder = ChunkEncoder.for_tokens(
                TINY_VOCAB, None, width=16, layers=1, heads=2, max_chunk=max(8, chunk_tokens), pooling=pooling
            )
        else:
            config = BertConfig(
                vocab_size=TINY_VOCAB,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
            encoder = ChunkEncoder(
                BertModel(config, add_pooling_layer=False),
                alignment="text",
                pooling=pooling,
                tokenizer=make_tiny_tokenizer(),
                decoder_tokenizer=plain.load_tokenizer(),
            )
        projector = Projector(16, _SIZES["hidden_size"])
        for layer in (projector.first, projector.second):
            torch.nn.init.normal_(layer.weight, std=0.2)
        made = {}
        for name in policies:
            policy = ChunkPolicy(PolicyConfig(encoder_width=16, query=name == "query", width=12, hidden=16))
            torch.nn.init.normal_(policy.score.weight)
            made[name] = PolicyPart(policy, facts={"steps": 0})
        write_refrag(
            plain, path, encoder=encoder, projector=projector, policies=made, chunk_tokens=chunk_tokens, name="tiny"
        )
    return path
