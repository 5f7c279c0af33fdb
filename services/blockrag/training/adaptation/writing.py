"""The bundle that an adaptation ends with."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from blockrag.modeling.adapter import Adapter, TokenRows, merge_adapter, put_token_rows
from blockrag.modeling.base import Base, open_base
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.adaptation.source import Source, load_for_training
from blockrag.training.run import Scores

_BLOCK_TOKEN = re.compile(r"<\|(?:link|sink)_\d+\|>")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_bundle(
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    config: BlockAdaptConfig,
    training: Mapping[str, Any],
    scores: Mapping[str, Scores],
    adapter: Adapter | None = None,
) -> Path:
    """Write the bundle ``config.out``. The directory appears whole or not at all.

    Without ``adapter`` it holds ``weights`` (a whole state dict) in the checkpoint's own type. With it, it holds the
    adapter on the source's base, and of ``weights`` only the rows of link and sink tokens in
    "model.embed_tokens.weight" (and "lm_head.weight", where that is not tied): nothing else may have been trained, and
    without such tokens ``weights`` may be empty. The base of a checkpoint directory is that directory. To a bundle
    that holds its weights itself an adapter cannot refer: it is merged into them. ``training`` goes to the manifest;
    ``scores`` are "before" and "after".
    """
    config.out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{config.out.name}-", dir=config.out.parent))
    try:
        parts: dict[str, Any] = {}
        if adapter is not None and source.base is None and source.bundle is not None:
            weights, adapter = _merged(weights, tokenizer, source, config, adapter), None
        if adapter is None:
            _write_checkpoint(weights, tokenizer, source, staging)
        else:
            rows = _token_rows(weights, tokenizer, source)
            cast = {name: (a.to(source.dtype), b.to(source.dtype)) for name, (a, b) in adapter.tensors.items()}
            parts = {"base": _base(source, config), "adapter": replace(adapter, tensors=cast), "token_rows": rows}
            _write_small_files(tokenizer, source, staging, rows)
        create_bundle(
            staging,
            config.out,
            source.template,
            name=config.name or config.out.name,
            chunk_tokens=source.chunk_tokens,
            passage_tokens=source.passage_tokens,
            max_context_tokens=source.max_positions,
            training=training,
            model_card=model_card(config, training, scores),
            **parts,
        )
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return config.out


def model_card(config: BlockAdaptConfig, training: Mapping[str, Any], scores: Mapping[str, Scores]) -> str:
    """Text of MODEL_CARD.md: what was done to which checkpoint with which data, and what was measured."""
    recipe = training["recipe"]
    extras = [
        f"distillation from the full mask with weight {recipe['distillation']}" if recipe["distillation"] else "",
        f"{recipe['link_tokens']} link tokens after each passage" if recipe["link_tokens"] else "",
        f"{recipe['sink_tokens']} sink tokens before each passage" if recipe["sink_tokens"] else "",
        f"a LoRA adapter of rank {recipe['lora_rank']} on the base" if recipe["lora_rank"] else "",
        f"up to {recipe['questions']} questions behind one context" if recipe["questions"] > 1 else "",
        "only the embeddings of these tokens were trained" if recipe["train"] == "tokens" else "",
    ]
    chosen = "; ".join(extra for extra in extras if extra)
    masks = {
        "both": "the block mask and the full mask",
        "mixed": "the block mask (two of three) or the full mask",
        "block": "the block mask alone",
        "full": "the full mask alone",
    }
    lines = [
        f"# {config.name or config.out.name}",
        "",
        f"`{config.model.name}`, adapted to block attention (arXiv 2409.15355) with `blockrag adapt block`: every "
        f"sample under {masks[recipe['masks']]}, global positions, loss on answers only"
        + (f"; {chosen}." if chosen else "."),
        "",
        f"- Steps: {recipe['steps']} of {recipe['batch_size']} samples, learning rate {recipe['learning_rate']:g} "
        f"after {recipe['warmup_steps']} steps of warm-up; {training['tokens']:,} tokens in {training['seconds']} s.",
        f"- Samples: {recipe['min_passages']} to {recipe['max_passages']} passages, the gold ones at any place; "
        f"{recipe['refusal_share']:.0%} without them, answered by a refusal.",
        f"- Data: {', '.join(file['file'] for file in training['data'])}. Name its licences here before you share it.",
        f"- Base: fingerprint {training['base']}.",
    ]
    if scores:
        lines += [
            "",
            "Measured on rows that were not trained on (given the right tokens before each; not a benchmark):",
            "",
            "| | block: nats per token | block: exact | full: nats per token | full: exact |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {when} | " + " | ".join(f"{one['nats']:.3f} | {one['exact']:.1%}" for one in found.values()) + " |"
            for when, found in scores.items()
        ]
    return "\n".join(lines) + "\n"


def _write_checkpoint(
    weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, source: Source, folder: Path
) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(source.checkpoint, local_files_only=True), dtype=source.dtype
    )
    rows = weights["model.embed_tokens.weight"].shape[0]
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.load_state_dict({name: tensor.to(source.dtype) for name, tensor in weights.items()})
    model.save_pretrained(folder)
    _copy_generation_config(source, folder)
    _write_tokenizer(tokenizer, source, folder)


def _write_small_files(
    tokenizer: PreTrainedTokenizerFast, source: Source, folder: Path, rows: TokenRows | None
) -> None:
    values = json.loads((source.checkpoint / "config.json").read_text(encoding="utf-8"))
    if rows is not None:
        values["vocab_size"] = max(values["vocab_size"], rows.first + len(rows.embedding))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _copy_generation_config(source, folder)
    _write_tokenizer(tokenizer, source, folder)


def _copy_generation_config(source: Source, folder: Path) -> None:
    if (source.checkpoint / "generation_config.json").is_file():
        shutil.copyfile(source.checkpoint / "generation_config.json", folder / "generation_config.json")


def _base(source: Source, config: BlockAdaptConfig) -> Base:
    return source.base if source.base is not None else open_base(source.checkpoint, config.out)


@torch.no_grad()
def _merged(
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    config: BlockAdaptConfig,
    adapter: Adapter,
) -> dict[str, Tensor]:
    """The source's weights in float32 with the adapter in them: those that were trained beside it may be narrower."""
    model, _, _ = load_for_training(source, config, with_adapter=False)
    merge_adapter(model, adapter)
    rows = _token_rows(weights, tokenizer, source)
    if rows is not None:
        put_token_rows(model, rows, model.get_input_embeddings().weight.shape[0], source.checkpoint)
    merged: dict[str, Tensor] = model.state_dict()
    return merged


def _token_rows(weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, source: Source) -> TokenRows | None:
    """Rows from the first link or sink token of the template to the last."""
    ids = [int(tokenizer.convert_tokens_to_ids(text)) for text in _BLOCK_TOKEN.findall(source.template.passage)]
    if not ids:
        return None
    span = slice(min(ids), max(ids) + 1)
    embedding, head = weights["model.embed_tokens.weight"], weights.get("lm_head.weight")
    tied = json.loads((source.checkpoint / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    return TokenRows(
        first=span.start,
        embedding=embedding[span].to(source.dtype),
        head=None if head is None or tied else head[span].to(source.dtype),
    )


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, source: Source, folder: Path) -> None:
    if _BLOCK_TOKEN.search(source.template.passage):
        tokenizer.save_pretrained(folder)
    else:  # as it came, byte for byte
        for name in _TOKENIZER_FILES:
            if (source.checkpoint / name).is_file():
                shutil.copyfile(source.checkpoint / name, folder / name)
