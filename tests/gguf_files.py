"""Tiny random GGUF files, written as llama.cpp's converter writes them, and installed packages that hold one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import SPECIAL_TOKENS, TINY_VOCAB, make_tiny_model, make_tiny_tokenizer

F32 = GGMLQuantizationType.F32
CHAT_TEMPLATE = (
    "{% for message in messages %}<|passage|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def tiny_gguf_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model whose rows are as long as blocks of quantised numbers need."""
    return make_tiny_model(family, seed=seed, **{"intermediate_size": 64, **overrides})


def make_tiny_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    chat_template: str | None = CHAT_TEMPLATE,
    change: Callable[[GGUFWriter], Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
) -> Path:
    """Write ``model`` (default: ``tiny_gguf_model()``) with matrices of ``kind``; returns ``path``.

    ``fields`` replaces what the header says: "architecture", "tokens", "tokenizer", "pre"; ``tensors`` replaces
    tensors or, with None, leaves them out; ``change`` adds to the header.
    """
    model = model or tiny_gguf_model()
    config, said = model.config, dict(fields or {})
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, said.get("architecture", architecture))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    _add_tokenizer(writer, said, chat_template)
    if change is not None:
        change(writer)
    for name, values in {**_named(model, architecture), **(tensors or {})}.items():
        if values is not None:
            stored = kind if values.ndim > 1 and kind != F32 else F32
            writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def install_package(
    site: Path, source: Path, *, name: str = "tiny-model", version: str = "1.0", copies: int = 1
) -> Path:
    """A distribution ``name`` in ``site`` that holds ``source`` ``copies`` times; its path within ``site``.

    Its module fails when it is imported: nothing may do that.
    """
    module = name.replace("-", "_")
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text("raise ImportError('this package is not to be imported')\n")
    files = [f"{module}/model{number or ''}.gguf" for number in range(copies)]
    for file in files:
        (site / file).write_bytes(source.read_bytes())
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    listed = [*files, f"{module}/__init__.py", f"{info.name}/METADATA", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in listed))
    return site / files[0]


def _add_tokenizer(writer: GGUFWriter, said: dict[str, Any], chat_template: str | None) -> None:
    stored = json.loads(make_tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    assert len(tokens) == TINY_VOCAB
    tokens = tokens[: said.get("tokens", TINY_VOCAB)]
    kinds = [TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model(said.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(said.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in stored["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _named(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        tensor = parameter.detach().float()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            key = module.endswith("k_proj")
            tensor = _interleaved(tensor, model.config.num_key_value_heads if key else model.config.num_attention_heads)
        found[f"{names.get_name(module)}.{kind}"] = tensor.numpy()
    return found


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbours: halves become pairs, head by head."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
