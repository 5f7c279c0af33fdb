"""The bundle that a stage starts from, with its chunk encoder and projector or new ones, and the one it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from blockrag.errors import SetupError
from blockrag.modeling.adapter import Adapter, join_adapters, merge_adapter, read_adapter
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.checkpoint import read_config
from blockrag.modeling.loading import skeleton, stored_dtype
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.pear import before_folding
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.record import Alignment, Pooling
from blockrag.modeling.refrag.refrag_writing import write_refrag
from blockrag.training.lora import trained_adapter
from blockrag.training.refrag.composed import ComposedDecoder
from blockrag.training.refrag.refrag_reader import RefragReader
from blockrag.training.refrag.stage_config import SMALL_ENCODER, RefragConfig
from blockrag.training.workers import switch_off_dropout

_SMALL_WIDTH = 768
"""Widest small encoder; narrower where the decoder is."""
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Start:
    """A checked starting point; no weights are loaded yet."""

    bundle: Bundle
    chunk_tokens: int
    """k"""
    alignment: Alignment
    pooling: Pooling

    @property
    def fresh(self) -> bool:
        """Whether chunk encoder and projector are to be made."""
        return self.bundle.refrag is None


def open_start(config: RefragConfig) -> Start:
    """Check what ``config`` names. Raises SetupError where it contradicts the bundle, BundleError for a bad bundle."""
    if config.out.exists():
        raise SetupError(f"{config.out}: exists already")
    bundle = load_bundle(config.bundle, verify_files=False)
    if config.average_with is not None:
        _check_same_shape(bundle, load_bundle(config.average_with, verify_files=False))
    named = config.encoder in ("", SMALL_ENCODER) or config.own_layers
    if not named and not (Path(config.encoder) / "config.json").is_file():
        raise SetupError(
            f"encoder {config.encoder!r}: neither {SMALL_ENCODER!r} nor 'decoder:N' nor a directory with config.json"
        )
    record = bundle.refrag
    k = config.chunk_tokens or bundle.chunk_tokens
    if k > bundle.passage_tokens:
        raise SetupError(f"chunk_tokens {k}: longer than a passage ({bundle.passage_tokens} tokens)")
    beside = config.lora_rank > 0 and bundle.base is not None  # the encoder's layers are the base's, without adapters
    if "decoder" in (config.alignment, record and record.alignment) and config.decoder_learns and not beside:
        raise SetupError(
            f"stage {config.stage}: its chunk encoder is the decoder's own first layers, which must stay as they are; "
            "freeze the decoder (--freeze-decoder), or train an adapter on a base (--lora-rank)"
        )
    if record is None:
        return Start(bundle, k, config.alignment, config.pooling or "mean")
    wanted: dict[str, tuple[Any, Any]] = {
        "chunk_tokens": (k, bundle.chunk_tokens),
        "pooling": (config.pooling or record.pooling, record.pooling),
        "encoder": (config.encoder, ""),
    }
    for name, (asked, there) in wanted.items():
        if asked != there:
            raise SetupError(f"{name} {asked!r}: {bundle.path} has a chunk encoder already, trained otherwise")
    return Start(bundle, k, record.alignment, record.pooling)


def _check_same_shape(bundle: Bundle, other: Bundle) -> None:
    shapes = []
    for one in (bundle, other):
        model = skeleton(read_config(one.decoder_dir))
        shapes.append({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    if shapes[0] != shapes[1]:
        raise SetupError(f"average_with {other.path}: its decoder has other layers or sizes than that of {bundle.path}")


def load_reader(start: Start, config: RefragConfig) -> tuple[RefragReader, PreTrainedTokenizerFast]:
    """Decoder, chunk encoder and projector in float32 on ``config.device``, and the bundle's tokenizer.

    New parts are random from ``config.seed``; the small encoder's word embeddings start from the decoder's.
    """
    torch.manual_seed(config.seed)
    bundle = start.bundle
    tokenizer = bundle.load_tokenizer()
    model = load_stock_model(bundle, device=config.device)
    switch_off_dropout(model)
    model.requires_grad_(True)
    decoder = ComposedDecoder(model)
    if not start.fresh:
        encoder = ChunkEncoder.load(bundle)
    elif start.alignment == "decoder":
        encoder = ChunkEncoder.of_decoder(bundle, config.own_layers, start.pooling, start.chunk_tokens)
    elif start.alignment == "tokens":
        embeddings = model.get_input_embeddings().weight.detach()
        width = min(decoder.width, _SMALL_WIDTH)
        encoder = ChunkEncoder.for_tokens(
            embeddings.shape[0],
            embeddings,
            width=width,
            heads=max(1, width // _HEAD_WIDTH),
            max_chunk=max(64, start.chunk_tokens),
            pooling=start.pooling,
        )
    else:
        encoder = ChunkEncoder.from_pretrained(config.encoder, "text", start.pooling, tokenizer)
    projector = Projector(encoder.width, decoder.width) if start.fresh else Projector.load(bundle.projector_file)
    if encoder.alignment != "text" and start.chunk_tokens > encoder.max_chunk_tokens:
        raise SetupError(f"chunk_tokens {start.chunk_tokens}: the chunk encoder reads {encoder.max_chunk_tokens}")
    switch_off_dropout(encoder)  # a resumed run draws no other numbers
    encoder.requires_grad_(encoder.alignment != "decoder")  # whose own layers stay as they are
    projector.requires_grad_(True)
    reader = RefragReader(decoder, encoder, projector, start.chunk_tokens)
    return reader.to(config.device).eval(), tokenizer


_DECODER = "decoder.model."


def write_stage(
    weights: Mapping[str, Tensor],
    start: Start,
    config: RefragConfig,
    facts: Mapping[str, Any],
) -> Bundle:
    """Write ``weights`` (a RefragReader's whole state dict) as the bundle ``config.out``; policies are left behind.

    ``facts`` become the last of the stages that the manifest lists. A decoder that the stage left alone is copied; an
    adapter that it learnt is joined with the bundle's, or merged where the bundle has no base.
    """
    reader, _ = load_reader(start, replace(config, device="cpu"))  # the trained one may be sharded over workers
    reader.encoder.load_state_dict(_of(weights, "encoder."))
    reader.projector.load_state_dict(_of(weights, "projector."))
    before = start.bundle.refrag
    parts: dict[str, Any] = {}
    if config.lora_rank:
        parts = _with_adapter(start, reader.decoder.model, trained_adapter(_of(weights, _DECODER), config.lora_rank))
    elif config.decoder_learns:
        parts = {"decoder": _of(weights, _DECODER)}
    return write_refrag(
        start.bundle,
        config.out,
        encoder=reader.encoder,
        projector=reader.projector,
        policies={},
        chunk_tokens=start.chunk_tokens,
        training=[*(before.training if before is not None else ()), facts],
        name=config.name,
        **parts,
    )


def _with_adapter(start: Start, model: PreTrainedModel, learnt: Adapter) -> dict[str, Any]:
    """What ``write_refrag`` is to write of the decoder; ``model`` is the one that ``learnt`` was learnt on."""
    bundle = start.bundle
    if bundle.base is None:
        merge_adapter(model, learnt)
        return {"decoder": model.state_dict()}
    there = read_adapter(bundle.adapter_dir) if bundle.adapter is not None else None
    if bundle.pear is not None:
        learnt = replace(learnt, tensors=before_folding(model, bundle.pear.heads, learnt.tensors))
    dtype = there.dtype if there is not None else stored_dtype(read_config(bundle.decoder_dir))
    narrow = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in learnt.tensors.items()}
    return {"adapter": join_adapters(there, replace(learnt, tensors=narrow))}


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
