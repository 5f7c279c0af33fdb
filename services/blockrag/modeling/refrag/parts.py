"""The files that a bundle compresses chunks with, checked against each other and against the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from blockrag.errors import BundleError
from blockrag.modeling.loading import check_finite, read_tensors
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.modeling.refrag.record import CHUNK_ENCODER_DIR, PROJECTOR_FILE, RefragRecord, is_refrag_file


def encoder_positions(config: Any) -> int:
    """Tokens that an encoder reads at once. RoBERTa counts positions from after its padding token's id."""
    positions = int(config.max_position_embeddings)
    roberta = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return positions - int(config.pad_token_id or 0) - 1 if roberta else positions


def check_parts(
    root: Path,
    record: RefragRecord,
    files: Mapping[str, str],
    *,
    decoder_config: Mapping[str, Any],
    chunk_tokens: int,
) -> None:
    """Raises BundleError for widths or a vocabulary that do not fit, and for NaN."""
    if record.alignment == "decoder":
        _check_own_layers(root, record, decoder_config, chunk_tokens)
    else:
        _check_encoder(root, record, decoder_config, chunk_tokens)
    projector = root / PROJECTOR_FILE
    shapes = {name: tensor.shape for name, tensor in read_tensors(projector).items()}
    first, second = shapes.get("first.weight", [0, 0]), shapes.get("second.weight", [0, 0])
    if first[-1] != record.encoder_width or second[0] != decoder_config.get("hidden_size"):
        raise BundleError(
            f"{projector}: projects {first[-1]} to {second[0]} numbers, where the chunk encoder gives "
            f"{record.encoder_width} and the decoder takes {decoder_config.get('hidden_size')}"
        )
    for name, policy in record.policies.items():
        config = ChunkPolicy.load(root / policy.file).config
        if config.encoder_width != record.encoder_width or config.query != policy.query:
            raise BundleError(
                f"{root / policy.file}: a policy for {config.encoder_width} numbers a chunk that "
                f"{'sees' if config.query else 'does not see'} the question, where the manifest's policy {name!r} "
                f"needs {record.encoder_width} and {'sees' if policy.query else 'does not see'} it"
            )
    for name in files:
        if name.endswith(".safetensors") and is_refrag_file(name):
            check_finite(root / name, read_tensors(root / name).items())


def _check_encoder(root: Path, record: RefragRecord, decoder_config: Mapping[str, Any], chunk_tokens: int) -> None:
    encoder = root / CHUNK_ENCODER_DIR / "config.json"
    try:
        config = AutoConfig.from_pretrained(encoder.parent, local_files_only=True)
        width, vocab_size, positions = int(config.hidden_size), int(config.vocab_size), encoder_positions(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(f"{encoder}: no text encoder in the Hugging Face format: {error}") from error
    if width != record.encoder_width:
        raise BundleError(f"{encoder}: width {width}, where the manifest's refrag has {record.encoder_width}")
    if record.alignment == "tokens":
        tokens = int(decoder_config["vocab_size"])
        if vocab_size < tokens:
            raise BundleError(f"{encoder}: a vocabulary of {vocab_size}, where the decoder has {tokens} tokens")
        if positions < chunk_tokens:
            raise BundleError(f"{encoder}: {positions} positions, where a chunk has {chunk_tokens} tokens")


def _check_own_layers(root: Path, record: RefragRecord, decoder_config: Mapping[str, Any], chunk_tokens: int) -> None:
    there = int(decoder_config.get("num_hidden_layers", 0))
    if record.encoder_layers > there:
        raise BundleError(f"{root}: refrag: the first {record.encoder_layers} layers of a decoder that has {there}")
    width = int(decoder_config["hidden_size"]) * (chunk_tokens if record.pooling == "concat" else 1)
    if width != record.encoder_width:
        raise BundleError(f"{root}: refrag: encoder_width {record.encoder_width}, where its layers give {width}")
