"""The bundle that a stage ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from blockrag.modeling.bundle import Bundle
from blockrag.modeling.refrag.writing import write_refrag
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

    ``facts`` become the last of the stages that the manifest lists. A decoder that the stage left alone is copied.
    """
    reader, _ = load_reader(start, replace(config, device="cpu"))  # the trained one may be sharded over workers
    reader.encoder.load_state_dict(_of(weights, "encoder."))
    reader.projector.load_state_dict(_of(weights, "projector."))
    before = start.bundle.refrag
    return write_refrag(
        start.bundle,
        config.out,
        encoder=reader.encoder,
        projector=reader.projector,
        policies={},
        decoder=_of(weights, _DECODER) if config.decoder_learns else None,
        chunk_tokens=start.chunk_tokens,
        training=[*(before.training if before is not None else ()), facts],
        name=config.name,
    )


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
