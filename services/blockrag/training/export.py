"""Writing a trained reader as a bundle: the directory that every service loads."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from blockrag.modeling.template import READER_TEMPLATE, PromptTemplate

BUNDLE_FORMAT = 1


@dataclass(frozen=True)
class BundleFacts:
    """What a bundle's manifest and model card say beside the weights."""

    name: str = "reader"
    version: str = "1"
    template: PromptTemplate = READER_TEMPLATE
    chunk_tokens: int = 16
    passage_tokens: int = 128
    quality: dict[str, Any] = field(default_factory=dict)
    """Measured scores, and how they were measured."""
    training: dict[str, Any] = field(default_factory=dict)
    """Command, steps, tokens, seconds and data."""
    model_card: str = ""
    """Text of MODEL_CARD.md."""


def export_bundle(model: LlamaForCausalLM, tokenizer_dir: Path, out: Path, facts: BundleFacts) -> Path:
    """Write ``model`` in bf16, the tokenizer of ``tokenizer_dir`` and the manifest to ``out``, replacing it.

    The directory appears whole or not at all: it is written beside ``out`` and renamed. Returns ``out``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        decoder = staging / "decoder"
        decoder.mkdir()
        half = LlamaForCausalLM(model.config).to(torch.bfloat16)
        half.load_state_dict(model.state_dict())
        half.save_pretrained(decoder, safe_serialization=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, decoder / name)
        if facts.model_card:
            (staging / "MODEL_CARD.md").write_text(facts.model_card, encoding="utf-8")
        for path in decoder.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        manifest = _manifest(staging, model, facts)
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        _swap(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def update_facts(bundle: Path, facts: BundleFacts) -> None:
    """Replace a bundle's manifest and model card (after it was evaluated), leaving its weights as they are."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["quality"], manifest["training"] = facts.quality, facts.training
    if facts.model_card:
        (bundle / "MODEL_CARD.md").write_text(facts.model_card, encoding="utf-8")
    written = bundle / ".manifest.json"
    written.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    written.replace(bundle / "manifest.json")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _manifest(staging: Path, model: LlamaForCausalLM, facts: BundleFacts) -> dict[str, Any]:
    files = sorted(path for path in (staging / "decoder").iterdir() if path.is_file())
    return {
        "format": BUNDLE_FORMAT,
        "name": facts.name,
        "version": facts.version,
        "template": facts.template.to_dict(),
        "chunk_tokens": facts.chunk_tokens,
        "passage_tokens": facts.passage_tokens,
        "max_context_tokens": int(model.config.max_position_embeddings),
        "files": {path.relative_to(staging).as_posix(): file_sha256(path) for path in files},
        "quality": facts.quality,
        "training": facts.training,
    }


def _swap(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(previous / "bundle")
    staging.rename(out)
    shutil.rmtree(previous)
