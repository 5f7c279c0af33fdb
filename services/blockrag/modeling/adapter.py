"""What was learnt on top of a base: a LoRA adapter (arXiv 2106.09685) in PEFT's format, and rows of added tokens.

PEFT is not needed to use either. An adapter's files load with ``peft.PeftModel.from_pretrained`` on the same base, and
merging gives what PEFT's ``merge_and_unload`` gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.errors import BundleError
from blockrag.modeling.adapter_record import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKEN_ROWS_FILE,
    AdapterConfig,
    check_token_rows_place,
    read_adapter_config,
)
from blockrag.modeling.loading import check_finite, read_tensors

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter that is read and checked in itself; ``merge_adapter`` checks it against a model."""

    config: AdapterConfig
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """By module, such as "model.layers.0.self_attn.q_proj": A [rank, in] and B [out, rank]."""
    base_name: str = ""
    """What the adapter says it was made for: ``Base.identity``, or whatever PEFT wrote."""
    path: Path = Path("the adapter")
    """Where it was read from, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors; what a copy is written in."""
        return next((down.dtype for down, _ in self.tensors.values()), torch.bfloat16)


@dataclass(frozen=True)
class TokenRows:
    """Embeddings of added tokens."""

    first: int
    """Id of the first."""
    embedding: Tensor
    """[n, width]."""
    head: Tensor | None = None
    """[n, width], where the output embedding is not tied to the input's."""


def read_adapter(folder: str | Path) -> Adapter:
    """Read the adapter in ``folder``: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises BundleError for a kind of adapter that cannot be read, for tensors that are missing, left over, of another
    rank or for other modules than the configuration says, and for NaN or infinity.
    """
    folder = Path(folder)
    config, base_name = read_adapter_config(folder)
    path = folder / ADAPTER_WEIGHTS
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BundleError(f"{path}: {key} is no tensor of a LoRA adapter")
        parts.setdefault(match[1], {})[match[2]] = tensor
    tensors = {}
    for module, pair in sorted(parts.items()):
        if set(pair) != {"A", "B"}:
            raise BundleError(f"{path}: {module} has lora_{next(iter(pair))} alone")
        tensors[module] = pair["A"], pair["B"]
    _check_pairs(path, tensors, config)
    return Adapter(config, tensors, base_name, path)


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add alpha / rank * B A to the weights, in place; computed in float32, kept in the weights' type.

    Raises BundleError where the adapter is for other modules or sizes than the model's; then nothing is changed.
    """
    modules = dict(model.named_modules())
    found = []
    for name, (down, up) in adapter.tensors.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise BundleError(f"{adapter.path}: made for another base: this one has no linear layer {name}")
        fits = (up.shape[0], down.shape[1])
        if fits != tuple(module.weight.shape):
            raise BundleError(
                f"{adapter.path}: made for another base: {name} is of shape {list(module.weight.shape)}, the adapter's "
                f"product {list(fits)}"
            )
        found.append((module.weight, down, up))
    scaling = adapter.config.alpha / adapter.config.rank
    for weight, down, up in found:
        down, up = (tensor.to(weight.device, torch.float32) for tensor in (down, up))
        weight.copy_(weight.float() + scaling * (up @ down))


def join_adapters(first: Adapter | None, second: Adapter) -> Adapter:
    """One adapter whose merging gives what merging ``first`` and then ``second`` gives.

    A = [A1; A2] and B = [B1, B2], with ``first``'s scale and values as they are; ``second``'s B takes up the
    difference of the scales. Where one of them adapts no such layer, its part is zero.
    """
    if first is None:
        return second
    ranks = first.config.rank, second.config.rank
    scale = first.config.alpha / ranks[0]
    change = second.config.alpha / ranks[1] / scale
    tensors = {}
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        down, up = first.tensors.get(name) or second.tensors[name]
        (down_1, up_1), (down_2, up_2) = (
            one.tensors.get(name, (down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)))
            for one, rank in zip((first, second), ranks, strict=True)
        )
        tensors[name] = torch.cat([down_1, down_2]), torch.cat([up_1, up_2 * change], dim=1)
    rank = sum(ranks)
    targets = {*first.config.target_modules, *second.config.target_modules}
    return Adapter(AdapterConfig(rank, scale * rank, tuple(sorted(targets))), tensors, first.base_name, first.path)


def write_adapter(folder: Path, adapter: Adapter, base_name: str) -> None:
    """Write an adapter in PEFT's format into ``folder``, which is made. ``base_name`` is ``Base.identity``.

    Raises BundleError as ``read_adapter`` would.
    """
    config = adapter.config
    _check_pairs(folder, adapter.tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": sorted(config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    named = {
        f"base_model.model.{module}.lora_{letter}.weight": tensor.detach().to("cpu", adapter.dtype).contiguous()
        for module, pair in adapter.tensors.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def write_token_rows(root: Path, rows: TokenRows) -> None:
    """Write the rows into the bundle ``root``, in their own type."""
    tensors = {"embedding": rows.embedding} | ({"head": rows.head} if rows.head is not None else {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, root / TOKEN_ROWS_FILE, metadata={"format": "pt"})


def read_token_rows(root: Path, place: Mapping[str, Any]) -> TokenRows:
    """Rows of the bundle ``root``, whose manifest says {"first": id, "count": n}. Raises BundleError."""
    path = root / TOKEN_ROWS_FILE
    first, count = check_token_rows_place(root, place)
    tensors = read_tensors(path)
    embedding = tensors.get("embedding")
    if embedding is None or not set(tensors) <= {"embedding", "head"}:
        raise BundleError(f"{path}: must hold embedding, and head where that is not tied")
    if any(tensor.ndim != 2 or tensor.shape != embedding.shape for tensor in tensors.values()):
        raise BundleError(f"{path}: rows of different sizes")
    if len(embedding) != count or not count:
        raise BundleError(f"{path}: {len(embedding)} rows, where the manifest has {count}")
    check_finite(path, tensors.items())
    return TokenRows(first, embedding, tensors.get("head"))


@torch.no_grad()
def put_token_rows(model: PreTrainedModel, rows: TokenRows, vocab_size: int, where: Path) -> None:
    """Give ``model`` a vocabulary of ``vocab_size`` and these rows in it. Raises BundleError where they do not fit."""
    known = model.get_input_embeddings().weight.shape[0]
    end = rows.first + len(rows.embedding)
    if vocab_size < known or end > vocab_size or (vocab_size > known and (rows.first > known or end < vocab_size)):
        raise BundleError(
            f"{where}: rows of the tokens {rows.first} to {end - 1}, for a vocabulary that grows from {known} to "
            f"{vocab_size}"
        )
    if vocab_size != known:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied != (rows.head is None):
        raise BundleError(f"{where}: {'has' if tied else 'lacks'} head, where the output embedding is tied: {tied}")
    for module, given in ((model.get_input_embeddings(), rows.embedding), (model.get_output_embeddings(), rows.head)):
        if given is not None:
            if given.shape[1] != module.weight.shape[1]:
                raise BundleError(f"{where}: rows of {given.shape[1]} numbers, not {module.weight.shape[1]}")
            module.weight[rows.first : end] = given.to(module.weight.device, module.weight.dtype)


def _check_pairs(path: Path, tensors: Mapping[str, tuple[Tensor, Tensor]], config: AdapterConfig) -> None:
    if not tensors:
        raise BundleError(f"{path}: holds no adapted layer")
    for module, (down, up) in tensors.items():
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != config.rank or up.shape[1] != config.rank:
            raise BundleError(
                f"{path}: {module} has A {list(down.shape)} and B {list(up.shape)}, where the rank is {config.rank}"
            )
        check_finite(path, ((f"{module}.lora_A", down), (f"{module}.lora_B", up)))
    adapted = {module.rpartition(".")[2] for module in tensors}
    if adapted != set(config.target_modules):
        raise BundleError(
            f"{path}: adapts {', '.join(sorted(adapted))}, where the configuration says "
            f"{', '.join(config.target_modules)}"
        )
