"""The bundle that a stage ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from blockrag.modeling.adapter import Adapter, join_adapters, merge_adapter, read_adapter
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.loading import stored_dtype
from blockrag.modeling.pear import before_folding
from blockrag.modeling.refrag.writing import write_refrag
from blockrag.training.lora import trained_adapter
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.opening import Start, load_reader

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
    dtype = stored_dtype(AutoConfig.from_pretrained(bundle.decoder_dir, local_files_only=True))
    dtype = there.dtype if there is not None else dtype
    narrow = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in learnt.tensors.items()}
    return {"adapter": join_adapters(there, replace(learnt, tensors=narrow))}


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
