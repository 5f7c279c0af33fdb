"""Making a bundle from a Hugging Face checkpoint: ``blockrag bundle create``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockrag.errors import BundleError
from blockrag.modeling.bundle import FORMAT, Bundle, file_sha256, load_bundle
from blockrag.modeling.support import ModelFacts, inspect_model
from blockrag.modeling.template import PromptTemplate

_COPIED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def create_bundle(
    model_dir: str | Path,
    out: str | Path,
    template: PromptTemplate,
    *,
    name: str = "",
    version: str = "1",
    chunk_tokens: int = 16,
    passage_tokens: int = 128,
    max_context_tokens: int | None = None,
    quality: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    model_card: str = "",
) -> Bundle:
    """Copy the checkpoint ``model_dir`` (safetensors, fast tokenizer) to a new bundle ``out`` and check it.

    ``max_context_tokens`` defaults to the model's positions. The directory appears whole or not at all. Raises
    BundleError when ``out`` exists or the checkpoint is incomplete, UnsupportedModelError when the model cannot be
    driven over slots.
    """
    source, target = Path(model_dir).expanduser(), Path(out).expanduser()
    if target.exists():
        raise BundleError(f"{target}: exists already")
    facts = _inspect(source)
    if max_context_tokens is not None and max_context_tokens > facts.max_positions:
        raise BundleError(f"{source}: {max_context_tokens} context tokens, where the model has {facts.max_positions}")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _copy_checkpoint(source, staging / "decoder")
        if model_card:
            (staging / "MODEL_CARD.md").write_text(model_card, encoding="utf-8")
        files = sorted(path for path in (staging / "decoder").iterdir() if path.is_file())
        manifest = {
            "format": FORMAT,
            "name": name or source.resolve().name,
            "version": version,
            "template": template.to_dict(),
            "chunk_tokens": chunk_tokens,
            "passage_tokens": passage_tokens,
            "max_context_tokens": max_context_tokens or facts.max_positions,
            "files": {path.relative_to(staging).as_posix(): file_sha256(path) for path in files},
            "quality": dict(quality or {}),
            "training": dict(training or {}),
        }
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        load_bundle(staging, verify_files=False).load_tokenizer()
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return load_bundle(target, verify_files=False)


def _inspect(source: Path) -> ModelFacts:
    """Check the architecture without loading weights."""
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{source}: no causal language model in the Hugging Face format: {error}") from error
    return inspect_model(model)


def _copy_checkpoint(source: Path, decoder: Path) -> None:
    decoder.mkdir()
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            copy = decoder / path.name
            shutil.copyfile(path, copy)
            copy.chmod(0o644)
    for pattern, what in (("*.safetensors", "weights in safetensors"), ("tokenizer.json", "a fast tokenizer")):
        if not any(decoder.glob(pattern)):
            raise BundleError(f"{source}: lacks {what} ({pattern})")
