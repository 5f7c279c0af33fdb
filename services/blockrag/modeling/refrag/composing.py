"""One passage as a mixture of expanded and compressed chunks, in two ways.

*Composed*: slots of the passage's full block stand for expanded chunks, slots of its compressed block for the others.
Both blocks are cached, so any mixture costs no pass; but a slot saw only its own form of the passage when it was made.
*Re-encoded*: one block pass over the mixture itself, where every slot sees the mixture before it. This is the exact
alternative that composition is compared with; it costs a pass for each mixture, and nothing of it can be cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from blockrag.budget import chunk_bounds, chunk_count
from blockrag.modeling.model import SlotModel
from blockrag.modeling.slots import ResidentBlock, SlotSlice


def compose_passage(
    full: ResidentBlock | None, compressed: ResidentBlock | None, expanded: Sequence[bool], chunk_tokens: int
) -> list[SlotSlice]:
    """The slices of a passage's mixture, in the passage's order, for ``SlotModel.new_sequence``.

    ``expanded[i]`` says of chunk i whether its tokens' slots are taken from ``full`` (n slots) or its one slot from
    ``compressed`` (m slots); a form that no chunk needs may be None. Neighbouring chunks of one form make one slice.
    Raises ValueError for a form that is needed and not there, and for blocks that do not fit ``expanded``.
    """
    if not expanded:
        raise ValueError("a passage has at least one chunk")
    if full is None and any(expanded):
        raise ValueError("a chunk is expanded, but the full block is not there")
    if compressed is None and not all(expanded):
        raise ValueError("a chunk is compressed, but the compressed block is not there")
    if full is not None and chunk_count(full.num_slots, chunk_tokens) != len(expanded):
        raise ValueError(f"{len(expanded)} decisions for {full.num_slots} tokens in chunks of {chunk_tokens}")
    if compressed is not None and compressed.num_slots != len(expanded):
        raise ValueError(f"{len(expanded)} decisions for {compressed.num_slots} compressed chunks")
    slices, first = [], 0
    for keep, run in groupby(map(bool, expanded)):
        last = first + len(list(run))
        if keep:
            assert full is not None
            slices.append(SlotSlice(full, first * chunk_tokens, min(last * chunk_tokens, full.num_slots)))
        else:
            assert compressed is not None
            slices.append(SlotSlice(compressed, first, last))
        first = last
    return slices


def mixed_inputs(
    model: SlotModel, token_ids: Sequence[int], projected: Tensor, expanded: Sequence[bool], chunk_tokens: int
) -> Tensor:
    """Input embeddings of a passage's mixture, [slots, width], for ``SlotModel.encode_embeddings``.

    ``projected`` [m, width] has one input embedding per chunk (``ChunkCompressor.project``). Raises ValueError when
    ``projected`` or ``expanded`` has not one entry per chunk, InvalidRequestError for a token outside the vocabulary.
    """
    bounds = chunk_bounds(len(token_ids), chunk_tokens)
    if not len(expanded) == len(projected) == len(bounds):
        raise ValueError(
            f"{len(expanded)} decisions and {len(projected)} projected embeddings for {len(bounds)} chunks"
        )
    tokens = model.embed_tokens(token_ids)
    chunks = projected.to(tokens)
    return torch.cat(
        [
            tokens[start:end] if keep else chunks[number : number + 1]
            for number, ((start, end), keep) in enumerate(zip(bounds, expanded, strict=True))
        ]
    )
