"""Making a bundle: from a Hugging Face checkpoint (``blockrag bundle create``), or with coefficients for its heads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockrag.errors import BundleError
from blockrag.modeling.bundle import FORMAT, Bundle, file_sha256, load_bundle
from blockrag.modeling.pear import PearRecord
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
    facts = _inspect(source)
    if max_context_tokens is not None and max_context_tokens > facts.max_positions:
        raise BundleError(f"{source}: {max_context_tokens} context tokens, where the model has {facts.max_positions}")
    with staged(target) as staging:
        _copy_checkpoint(source, staging / "decoder")
        if model_card:
            (staging / "MODEL_CARD.md").write_text(model_card, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "name": name or source.resolve().name,
            "version": version,
            "template": template.to_dict(),
            "chunk_tokens": chunk_tokens,
            "passage_tokens": passage_tokens,
            "max_context_tokens": max_context_tokens or facts.max_positions,
            "files": digests(staging, "decoder"),
            "quality": dict(quality or {}),
            "training": dict(training or {}),
        }
        write_manifest(staging, manifest)
        load_bundle(staging, verify_files=False).load_tokenizer()
    return load_bundle(target, verify_files=False)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that becomes it when the body succeeds and vanishes when it fails.

    Raises BundleError when ``target`` exists.
    """
    if target.exists():
        raise BundleError(f"{target}: exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        # whoever serves it may not be the one who made it, and temporary files are their maker's alone
        for path in (staging, *staging.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def digests(root: Path, *names: str) -> dict[str, str]:
    """SHA-256 of the files ``names``, and of the files in the directories among them, by path within ``root``."""
    found = (path for name in names for path in ((root / name).iterdir() if (root / name).is_dir() else [root / name]))
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(found) if path.is_file()}


def copy_files(bundle: Bundle, target: Path, names: Iterable[str]) -> None:
    """Copy files of a bundle to the same places within ``target``."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, target / name)


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json``."""
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def with_section(card: str, heading: str, body: Iterable[str]) -> str:
    """A model card whose section ``heading`` ("## …") has these lines; it is put last when it was not there."""
    before, _, rest = card.partition(heading)
    _, mark, after = rest.partition("\n## ")
    parts = [before.rstrip(), "\n".join([heading, "", *body]), f"## {after.rstrip()}" if mark else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_pear(bundle: Bundle, record: PearRecord, out: str | Path | None) -> Bundle:
    """A copy of ``bundle`` at ``out`` with these coefficients, instead of those it may have; None: ``bundle`` itself.

    Only the manifest and the model card differ; the weights stay as they are and are folded when they are loaded. The
    manifest's quality is emptied, because it was measured with other effective weights. A kill leaves the bundle with
    or without the coefficients, never in between. Raises BundleError when ``out`` exists, and for a bundle whose chunk
    compression was trained with the present weights.
    """
    if bundle.refrag is not None:
        raise BundleError(
            f"{bundle.path}: its chunk compression was trained with the decoder's present weights: apply PEAR first, "
            "then blockrag adapt refrag"
        )
    manifest = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    manifest.update(pear=record.to_dict(), quality={})
    card = bundle.path / "MODEL_CARD.md"
    described = _describe_pear(card.read_text(encoding="utf-8") if card.exists() else "", record)
    options: dict[str, Any] = {"compute_dtype": bundle.compute_dtype, "kv_dtype": bundle.kv_dtype}
    if out is None:
        _replace(bundle.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        _replace(card, described)
        return load_bundle(bundle.path, verify_files=False, **options)
    target = Path(out).expanduser()
    with staged(target) as staging:
        copy_files(bundle, staging, bundle.files)
        write_manifest(staging, manifest)
        (staging / card.name).write_text(described, encoding="utf-8")
        load_bundle(staging, verify_files=False)
    return load_bundle(target, verify_files=False, **options)


_PEAR_HEADING = "## Re-weighted heads (PEAR)"


def _describe_pear(card: str, record: PearRecord) -> str:
    rows = [f"| {item.layer} | {item.head} | {item.tau:.3f} | {item.delta_pi:+.1%} |" for item in record.heads]
    losses = [
        f"{mask} mask {record.before[mask].loss:.3f} to {record.after[mask].loss:.3f} nats" for mask in record.before
    ]
    body = (
        f"Detected and learned under the {record.mask} mask; loss of copying random tokens: {'; '.join(losses)}. "
        "Scores above were measured before.",
        "",
        "| layer | head | coefficient | why: the copied token's logit without it |",
        "|---|---|---|---|",
        *rows,
    )
    return with_section(card, _PEAR_HEADING, body)


def _replace(path: Path, text: str) -> None:
    written = path.with_name(f".{path.name}")
    written.write_text(text, encoding="utf-8")
    written.replace(path)


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
            shutil.copyfile(path, decoder / path.name)
    for pattern, what in (("*.safetensors", "weights in safetensors"), ("tokenizer.json", "a fast tokenizer")):
        if not any(decoder.glob(pattern)):
            raise BundleError(f"{source}: lacks {what} ({pattern})")
