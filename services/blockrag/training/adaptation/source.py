"""The checkpoint, GGUF file, package or bundle that an adaptation starts from, and the bundle that it ends with.

Link and sink tokens are trainable tokens that end and open each passage's block. They are ordinary entries of the
vocabulary, written by the template into every passage's block. So a cached block holds their keys and values like any
other slot's, and everything that serves or verifies a bundle stays as it is.

Links give a block a place to gather what the question may ask of it (KVLink, arXiv 2502.16002, section 3.2, five per
document); sinks take up the attention that the first tokens of a text attract (arXiv 2309.17453).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from blockrag.errors import BundleError, UnsupportedModelError
from blockrag.modeling.adapter import Adapter, TokenRows, merge_adapter, put_token_rows, read_adapter
from blockrag.modeling.base import Base, is_base, open_base
from blockrag.modeling.bundle import Bundle, check_tokenizer, file_sha256, load_bundle
from blockrag.modeling.bundle_writing import create_bundle, save_weights
from blockrag.modeling.chat_template import default_template, read_template
from blockrag.modeling.checkpoint import check_checkpoint, inspect_checkpoint, load_checkpoint, read_config
from blockrag.modeling.files import hashed, read_json
from blockrag.modeling.loading import read_tokenizer, stored_dtype
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.template import PromptTemplate
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.run import Scores

PASSAGE_TOKENS = 128
CHUNK_TOKENS = 16


@dataclass(frozen=True)
class Source:
    """What is adapted, checked; no weights are loaded yet."""

    checkpoint: Path
    """Directory of the Hugging Face checkpoint: configuration and tokenizer, and the weights but for a bundle with a
    base (``Bundle.weights_dir``)."""
    bundle: Bundle | None
    """The bundle it lies in, if it does."""
    template: PromptTemplate
    """With the link and sink tokens."""
    passage_tokens: int
    """Most tokens of a passage's block."""
    chunk_tokens: int
    max_positions: int
    plain_positions: int
    """Longest sample: beyond it a layer with a window does not see all earlier positions, as training does."""
    dtype: torch.dtype
    """The checkpoint's own; the adapted one is written in it."""
    base: Base | None = None
    """The GGUF file or package that it is, or the bundle's base; paths as the bundle to be made has them."""
    adapter: Adapter | None = None
    """What the bundle has learnt on top of its base, to go on from."""

    def fingerprint(self) -> str:
        """40 hex digits over the checkpoint's files. Reads all weights."""
        if self.bundle is not None:
            return self.bundle.fingerprint
        if self.base is not None:
            return hashed({"base": self.base.content})
        digest = hashlib.blake2b(digest_size=20, person=b"blockrag-source")
        for path in sorted(self.checkpoint.iterdir()):
            if path.suffix in (".safetensors", ".json"):
                digest.update(f"{path.name} {file_sha256(path)}\n".encode())
        return digest.hexdigest()


def open_source(config: BlockAdaptConfig) -> Source:
    """Check what ``config.model`` names.

    That is a directory, a bundle, a ``.gguf`` file or ``package:NAME``; the last two are converted now, unless they
    were. Raises BundleError for something that is none of them, UnsupportedModelError for an architecture that cannot
    be driven over slots.
    """
    bundle = base = None
    if is_base(config.model):
        base = open_base(config.model, config.out)
        checkpoint = weights = base.checkpoint(config.out)
    else:
        root = config.model.expanduser()
        if not root.is_dir():
            raise BundleError(f"{root}: no such model directory")
        bundle = load_bundle(root, verify_files=False) if (root / "manifest.json").is_file() else None
        checkpoint = bundle.decoder_dir if bundle else root
        weights = bundle.weights_dir() if bundle else root
        base = bundle.base.moved(bundle.path, config.out) if bundle and bundle.base else None
    facts = inspect_checkpoint(checkpoint)
    check_checkpoint(weights)
    if facts.softcap is not None:
        raise UnsupportedModelError(
            f"{facts.name}: it is served as it is, but not trained: the attention of training has no bound of scores "
            "(attn_logit_softcapping)"
        )
    if config.template_file is not None:
        template = read_template(config.template_file)
    else:
        template = bundle.template if bundle else default_template(read_tokenizer(checkpoint))
    limits = [facts.max_positions, *([bundle.max_context_tokens] if bundle else [])]
    adapter = read_adapter(bundle.adapter_dir) if bundle and bundle.adapter else None
    return Source(
        checkpoint=checkpoint,
        bundle=bundle,
        template=with_block_tokens(template, config.link_tokens, config.sink_tokens),
        passage_tokens=config.passage_tokens or (bundle.passage_tokens if bundle else PASSAGE_TOKENS),
        chunk_tokens=bundle.chunk_tokens if bundle else CHUNK_TOKENS,
        max_positions=min(limits),
        plain_positions=min(*limits, facts.plain_positions),
        dtype=stored_dtype(read_config(checkpoint)),
        base=base,
        adapter=adapter,
    )


def load_for_training(
    source: Source, config: BlockAdaptConfig, *, with_adapter: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[int]]:
    """The model in float32 on the CPU, its tokenizer, and the ids of the link and sink tokens added to both.

    A bundle's adapter is merged and coefficients that it records for its heads are folded into the weights.
    ``with_adapter`` False leaves the adapter out, for who goes on from ``source.adapter``. Raises BundleError when the
    weights do not load.
    """
    if source.bundle is not None:
        model = load_stock_model(source.bundle, compute_dtype="float32", with_adapter=with_adapter)
    else:
        model = load_checkpoint(source.checkpoint, torch.float32)
    model.config.dtype = source.dtype
    tokenizer = read_tokenizer(source.checkpoint)
    ids = add_block_tokens(model, tokenizer, config.link_tokens, config.sink_tokens, config.seed)
    # before hours are spent: what the finished bundle would be refused for
    check_tokenizer(tokenizer, source.template, len(model.get_input_embeddings().weight), source.checkpoint)
    return model.requires_grad_(True), tokenizer, ids


def block_tokens(links: int, sinks: int) -> list[str]:
    """Texts of the tokens, sinks first."""
    return [f"<|sink_{number}|>" for number in range(sinks)] + [f"<|link_{number}|>" for number in range(links)]


def with_block_tokens(template: PromptTemplate, links: int, sinks: int) -> PromptTemplate:
    """``template`` with the tokens around each passage. Raises BundleError when it has such tokens already."""
    texts = block_tokens(links, sinks)
    present = [text for text in texts if text in template.passage]
    if present:
        raise BundleError(f"the template's passage holds {', '.join(present)} already: it was adapted with them")
    opening, closing = "".join(texts[:sinks]), "".join(texts[sinks:])
    return replace(template, passage=f"{opening}{template.passage}{closing}")


def add_block_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, links: int, sinks: int, seed: int
) -> list[int]:
    """Add the tokens to tokenizer and model; gives their ids.

    Their embeddings start at the vocabulary's mean with a tenth of its spread as noise: near what the layers know,
    and not all alike. Rows that the model has to spare are used before its vocabulary grows.
    """
    texts = block_tokens(links, sinks)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True)
    ids = [int(tokenizer.convert_tokens_to_ids(text)) for text in texts]
    if not ids:
        return ids
    known = len(tokenizer) - len(ids)
    if max(ids) >= int(model.config.vocab_size):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(head.weight): head.weight for head in heads if head is not None}  # one where they are tied
    with torch.no_grad():
        for weight in weights.values():
            rows = weight[:known].float()
            noise = torch.randn(len(ids), weight.shape[1], generator=generator)
            weight[ids] = (rows.mean(0) + 0.1 * rows.std(0) * noise).to(weight.dtype)
    return ids


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
    if adapter is not None and source.base is None and source.bundle is not None:
        weights, adapter = _merged(weights, tokenizer, source, config, adapter), None
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix=f".{config.out.name}-", dir=config.out.parent) as folder:
        staging = Path(folder)
        copied = ["generation_config.json"]
        if _BLOCK_TOKEN.search(source.template.passage):
            tokenizer.save_pretrained(staging)
        else:  # as it came, byte for byte
            copied += _TOKENIZER_FILES
        if adapter is None:
            save_weights(weights, source.checkpoint, staging, len(weights["model.embed_tokens.weight"]))
        else:
            rows = _token_rows(weights, tokenizer, source)
            cast = {name: (a.to(source.dtype), b.to(source.dtype)) for name, (a, b) in adapter.tensors.items()}
            base = source.base or open_base(source.checkpoint, config.out)
            parts = {"base": base, "adapter": replace(adapter, tensors=cast), "token_rows": rows}
            values = read_json(source.checkpoint / "config.json")
            if rows is not None:
                values["vocab_size"] = max(values["vocab_size"], rows.first + len(rows.embedding))
            (staging / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for name in copied:
            if (source.checkpoint / name).is_file():
                shutil.copyfile(source.checkpoint / name, staging / name)
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
    tied = read_json(source.checkpoint / "config.json").get("tie_word_embeddings")
    return TokenRows(
        first=span.start,
        embedding=embedding[span].to(source.dtype),
        head=None if head is None or tied else head[span].to(source.dtype),
    )
