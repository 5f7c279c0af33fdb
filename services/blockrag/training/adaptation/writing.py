"""The bundle that an adaptation ends with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from blockrag.modeling.bundle_writing import create_bundle
from blockrag.training.adaptation.config import BlockAdaptConfig
from blockrag.training.adaptation.metrics import DevScores
from blockrag.training.adaptation.source import Source

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_bundle(
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    config: BlockAdaptConfig,
    training: Mapping[str, Any],
    scores: Mapping[str, DevScores],
) -> Path:
    """Write ``weights`` (a whole state dict), in the checkpoint's own type, as the bundle ``config.out``.

    ``training`` goes to the manifest; ``scores`` are "before" and "after". The directory appears whole or not at all.
    """
    config.out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{config.out.name}-", dir=config.out.parent))
    try:
        _write_checkpoint(weights, tokenizer, source, staging)
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
        )
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return config.out


def model_card(config: BlockAdaptConfig, training: Mapping[str, Any], scores: Mapping[str, DevScores]) -> str:
    """Text of MODEL_CARD.md: what was done to which checkpoint with which data, and what was measured."""
    recipe = training["recipe"]
    extras = [
        f"distillation from the full mask with weight {recipe['distillation']}" if recipe["distillation"] else "",
        f"{recipe['link_tokens']} link tokens after each passage" if recipe["link_tokens"] else "",
        f"{recipe['sink_tokens']} sink tokens before each passage" if recipe["sink_tokens"] else "",
        "only the embeddings of these tokens were trained" if recipe["train"] == "tokens" else "",
    ]
    chosen = "; ".join(extra for extra in extras if extra)
    masks = {"both": "the block mask and the full mask", "block": "the block mask alone", "full": "the full mask alone"}
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
            f"| {when} | {found.block_loss:.3f} | {found.block_exact:.1%} | {found.full_loss:.3f} "
            f"| {found.full_exact:.1%} |"
            for when, found in scores.items()
        ]
    return "\n".join(lines) + "\n"


def _write_checkpoint(
    weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, source: Source, folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.checkpoint, dtype=source.dtype, local_files_only=True)
    rows = weights["model.embed_tokens.weight"].shape[0]
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.load_state_dict({name: tensor.to(source.dtype) for name, tensor in weights.items()})
    model.save_pretrained(folder)
    if "<|link_0|>" in source.template.passage or "<|sink_0|>" in source.template.passage:
        tokenizer.save_pretrained(folder)
    else:  # as it came, byte for byte
        for name in _TOKENIZER_FILES:
            if (source.checkpoint / name).is_file():
                shutil.copyfile(source.checkpoint / name, folder / name)
