"""GGUF files: checked by their header, then turned into a Hugging Face checkpoint.

The header says everything that can make a file unusable, so a file that cannot be read is refused before anything is
dequantised. What is refused would otherwise load and compute something else than the model: frequencies of a rotary
embedding that are scaled, tensors that nothing reads, a way of splitting text that is not known.

transformers reads GGUF files itself. Its tokenizer is taken. Its weights are not, because it parses the header four
times (a second of work and nineteen of waiting for 135M parameters) and drops silently what it does not know; the
values are the same (``tests/unit/modeling/test_gguf_file.py`` compares them).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from blockrag.errors import BundleError
from blockrag.modeling.loading import check_finite, skeleton

ARCHITECTURES: Mapping[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
"""By ``general.architecture``; llama.cpp writes Mistral models as "llama"."""

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_FREQUENCIES = "rope_freqs.weight"
# How text is split before merges, by tokenizer.ggml.pre: what transformers knows, or what is GPT-2's own way.
_SPLITS = frozenset(
    {"gpt-2", "default", "smollm", "llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx", "pixtral"}
    | {"tekken", "qwen2", "deepseek-r1-qwen", "megrez"}
)


@dataclass(frozen=True)
class GgufFile:
    """A checked file. Its tensors are mapped into memory, none is read yet."""

    path: Path
    config: PretrainedConfig
    tensors: Mapping[str, ReaderTensor]
    """By the name that transformers gives the parameter."""
    splits: str
    """``tokenizer.ggml.pre``: how text is split before merges; empty for a SentencePiece vocabulary."""
    permuted: bool
    """Whether the rows of W_Q and W_K are in llama.cpp's order."""


def open_gguf(path: Path) -> GgufFile:
    """Check a file by its header.

    Raises BundleError naming the file and the problem: no such file, no GGUF, truncated, an architecture or a
    quantisation that cannot be read, tensors that are missing, left over or of another size, a tokenizer that does
    not fit.
    """
    reader = _read(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    values = {name: field.contents() for name, field in fields.items()}
    architecture = str(values.get("general.architecture"))
    if int(values.get("split.count", 1)) > 1:
        raise BundleError(f"{path}: one of {values['split.count']} parts; join them: llama-gguf-split --merge")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BundleError(f"{path}: architecture {architecture!r} cannot be read; these can: {known} (and Mistral)")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_types(path, tensors)
    config = _config(path, architecture, values, tensors)
    splits = _check_tokenizer(path, reader, int(config.vocab_size))
    config.dtype = _dtype(tensors)
    _set_token_ids(config, reader)
    return GgufFile(
        path=path,
        config=config,
        tensors=_parameters(path, architecture, config, tensors),
        splits=splits,
        permuted=architecture == "llama",
    )


def convert(file: GgufFile, folder: Path) -> None:
    """Write ``file`` as a Hugging Face checkpoint with its tokenizer into the empty directory ``folder``.

    What it writes is ``base.CONVERTER``'s version.

    Raises BundleError for a tokenizer that does not load and for NaN or infinity, OSError or SafetensorError where
    the disk does not take it.
    """
    _tokenizer(file).save_pretrained(folder)
    file.config.architectures = [type(skeleton(file.config)).__name__]
    file.config.save_pretrained(folder)
    save_file(dict(_weights(file)), folder / "model.safetensors", metadata={"format": "pt"})


def _read(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as source:
            magic = source.read(4)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise BundleError(f"{path}: no GGUF file: it starts with {magic!r}")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError, struct.error) as error:
        if "GGMLQuantizationType" in str(error):
            raise BundleError(f"{path}: a tensor's type is not known, so it cannot be dequantised: {error}") from error
        raise BundleError(f"{path}: truncated or damaged: {error}") from error


def _check_types(path: Path, tensors: Mapping[str, ReaderTensor]) -> None:
    for kind in {tensor.tensor_type for tensor in tensors.values()}:
        _, size = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, size), np.uint8) if kind not in _FLOATS[:2] else np.zeros((1, 1), np.float32), kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            name = next(tensor.name for tensor in tensors.values() if tensor.tensor_type == kind)
            raise BundleError(f"{path}: {name} is of type {kind.name}, which cannot be dequantised") from error


def _config(
    path: Path, architecture: str, values: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]
) -> PretrainedConfig:
    def value(key: str, default: Any = None) -> Any:
        found = values.get(f"{architecture}.{key}", default)
        if found is None:
            raise BundleError(f"{path}: its header lacks {architecture}.{key}")
        return found

    if value("expert_count", 0):
        raise BundleError(f"{path}: a mixture of experts, which cannot be read")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise BundleError(f"{path}: lacks the tensor token_embd.weight")
    heads, width = int(value("attention.head_count")), int(value("embedding_length"))
    head_dim = int(value("attention.key_length", value("rope.dimension_count", width // heads)))
    if int(value("attention.value_length", head_dim)) != head_dim:
        raise BundleError(f"{path}: keys and values of different sizes, which cannot be read")
    if int(value("rope.dimension_count", head_dim)) != head_dim:
        raise BundleError(f"{path}: rotary positions over a part of each head, which cannot be read")
    options: dict[str, Any] = {
        "vocab_size": int(embedding.shape[-1]),
        "hidden_size": width,
        "intermediate_size": int(value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(value("context_length")),
        "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(path, architecture, values, tensors, head_dim),
    }
    kind = ARCHITECTURES[architecture]
    if architecture == "llama":
        options["attention_bias"] = "blk.0.attn_q.bias" in tensors
        if window := value("attention.sliding_window", 0):
            kind, options["sliding_window"] = MistralConfig, int(window)
            options.pop("attention_bias")
    return kind(**options)


def _rope(
    path: Path, architecture: str, values: Mapping[str, Any], tensors: Mapping[str, ReaderTensor], head_dim: int
) -> dict[str, Any]:
    """Llama 3's scaled frequencies stand in a tensor; the four numbers that they come from do not, and are guessed.

    The guess counts when it gives that tensor.
    """
    theta = float(values.get(f"{architecture}.rope.freq_base", 10000.0))
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    plain = {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        return {**plain, "rope_type": "linear", "factor": float(values[f"{architecture}.rope.scaling.factor"])}
    if scaling != "none" or f"{architecture}.rope.scale_linear" in values:
        raise BundleError(f"{path}: rotary positions scaled by {scaling!r}, which cannot be read")
    if _FREQUENCIES not in tensors:
        return plain
    factors = torch.from_numpy(np.array(tensors[_FREQUENCIES].data, np.float32))
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    share = ((original * frequencies / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if len(factors) != len(expected) or not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise BundleError(f"{path}: {_FREQUENCIES} scales rotary positions in a way that is not known")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {**plain, "rope_type": "llama3", **dict(zip(names, (factor, low, high, original), strict=True))}


def _check_tokenizer(path: Path, reader: GGUFReader, rows: int) -> str:
    model, tokens = reader.get_field("tokenizer.ggml.model"), reader.get_field("tokenizer.ggml.tokens")
    kind = model.contents() if model else None
    if kind not in ("gpt2", "llama") or tokens is None:
        raise BundleError(f"{path}: its tokenizer is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' can be read")
    if len(tokens.data) != rows:
        raise BundleError(f"{path}: the tokenizer has {len(tokens.data)} tokens, the embedding {rows} rows")
    if kind == "llama":
        return ""
    field = reader.get_field("tokenizer.ggml.pre")
    splits = str(field.contents()) if field else "default"
    if splits not in _SPLITS:
        raise BundleError(f"{path}: its tokenizer splits text as {splits!r}; known are: {', '.join(sorted(_SPLITS))}")
    if reader.get_field("tokenizer.ggml.merges") is None:
        raise BundleError(f"{path}: lacks tokenizer.ggml.merges")
    return splits


def _set_token_ids(config: PretrainedConfig, reader: GGUFReader) -> None:
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        field = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        setattr(config, f"{name}_token_id", int(field.contents()) if field else None)


def _dtype(tensors: Mapping[str, ReaderTensor]) -> torch.dtype:
    """What the weights are written in: bfloat16 for quantised ones, whose own error is far larger than what that rounds
    off; float32 where the file holds float32 or float16."""
    kinds = {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1}
    exact = kinds <= {*_FLOATS} and kinds != {GGMLQuantizationType.BF16}
    return torch.float32 if exact else torch.bfloat16


def _parameters(
    path: Path, architecture: str, config: PretrainedConfig, tensors: Mapping[str, ReaderTensor]
) -> dict[str, ReaderTensor]:
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, int(config.num_hidden_layers))
    found, missing = {}, []
    for name, parameter in skeleton(config).named_parameters():
        module, _, kind = name.rpartition(".")
        stored = f"{names.get_name(module)}.{kind}"
        if stored not in tensors:
            missing.append(stored)
            continue
        # GGUF counts the fastest dimension first
        shape = tuple(int(size) for size in reversed(tensors[stored].shape))
        if shape != tuple(parameter.shape):
            raise BundleError(f"{path}: {stored} is of shape {list(shape)}, not {list(parameter.shape)}")
        found[name] = tensors[stored]
    left = sorted(set(tensors) - {tensor.name for tensor in found.values()} - {_FREQUENCIES})
    for what, listed in (("lacks the tensors", missing), ("has tensors that are not known:", left)):
        if listed:
            raise BundleError(f"{path}: {what} {', '.join(listed[:8])}")
    return found


def _weights(file: GgufFile) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in file.tensors.items():
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        check_finite(file.path, [(tensor.name, values)])
        if file.permuted and (".q_proj." in name or ".k_proj." in name):
            # llama.cpp turns neighbours, transformers turns halves: pairs become halves, head by head
            heads = file.config.num_attention_heads if ".q_proj." in name else file.config.num_key_value_heads
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        yield name, values.to(file.config.dtype).contiguous()


def _tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    try:
        read: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BundleError(f"{file.path}: the tokenizer does not load: {error}") from error
    # transformers goes through GPT-2's class, which adds <|endoftext|> to a vocabulary without it
    rows = int(file.config.vocab_size)
    state = json.loads(read.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    backend = Tokenizer.from_str(json.dumps(state))
    if file.splits == "smollm":  # digits stand alone; transformers takes GPT-2's way, which joins what stands before
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    highest = max(backend.get_vocab().values(), default=-1)
    if highest >= rows:
        raise BundleError(f"{file.path}: the tokenizer has a token {highest}, the embedding {rows} rows")
    special = {name: getattr(read, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in special.items() if text in backend.get_vocab()},
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer
