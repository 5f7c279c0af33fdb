"""Compression at inference: blocks to chunk embeddings, and those to input embeddings of the decoder.

The projector φ leads from the one to the other (REFRAG, arXiv 2509.01092, section 2): a two-layer MLP; its activation
is unspecified there, GELU here.

And one passage as a mixture of expanded and compressed chunks, in two ways. *Composed*: slots of the passage's full
block stand for expanded chunks, slots of its compressed block for the others. Both blocks are cached, so any mixture
costs no pass; but a slot saw only its own form of the passage when it was made. *Re-encoded*: one block pass over the
mixture itself, where every slot sees the mixture before it. This is the exact alternative that composition is compared
with; it costs a pass for each mixture, and nothing of it can be cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blockrag.budget import chunk_bounds, chunk_count
from blockrag.errors import BundleError, InvalidRequestError
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.linear_layers import speed_up_linear_layers
from blockrag.modeling.loading import check_finite, read_tensors
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.slots import ResidentBlock, SlotSlice

_NAMES = {"first.weight": 2, "first.bias": 1, "second.weight": 2, "second.bias": 1}


class Projector(nn.Module):
    """Linear, GELU, Linear; float32."""

    def __init__(self, encoder_width: int, decoder_width: int, hidden: int | None = None) -> None:
        """``hidden`` is the width between the layers; None: the decoder's."""
        super().__init__()
        self.first = nn.Linear(encoder_width, hidden or decoder_width)
        self.second = nn.Linear(hidden or decoder_width, decoder_width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Chunk embeddings [..., encoder_width] to input embeddings [..., decoder_width]."""
        projected: Tensor = self.second(nn.functional.gelu(self.first(embeddings)))
        return projected

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Projector:
        """Read what ``save`` wrote, in evaluation mode. Raises BundleError for a damaged file, NaN or infinity."""
        where = Path(path)
        tensors = read_tensors(where, "the projector does not load: ")
        if {name: tensor.ndim for name, tensor in tensors.items()} != _NAMES:
            raise BundleError(f"{where}: no projector of two layers: {', '.join(sorted(tensors)) or 'empty'}")
        check_finite(where, tensors.items())
        hidden, encoder_width = tensors["first.weight"].shape
        projector = cls(encoder_width, tensors["second.weight"].shape[0], hidden)
        try:
            projector.load_state_dict(tensors)
        except RuntimeError as error:
            raise BundleError(f"{where}: the projector's layers do not fit each other: {error}") from error
        return projector.eval().to(device)


_BATCH_TOKENS = 8192
"""Tokens encoded at a time; bounds the memory of a large batch of blocks."""


class ChunkCompressor:
    """A bundle's chunk encoder and projector. Not thread-safe: one thread computes."""

    def __init__(self, encoder: ChunkEncoder, projector: Projector, chunk_tokens: int) -> None:
        """Both in evaluation mode on one device; ``chunk_tokens`` is k."""
        self.encoder = encoder
        self.projector = projector
        self.chunk_tokens = chunk_tokens
        """Tokens of a chunk (k)."""

    @classmethod
    def load(cls, bundle: Bundle, device: str | torch.device = "cpu") -> ChunkCompressor:
        """Load what ``bundle`` compresses with, in float32 and for inference only.

        Raises BundleError when the bundle has no chunk compression, or when its parts are damaged.
        """
        encoder = ChunkEncoder.load(bundle, device=device)
        projector = Projector.load(bundle.projector_file, device=device)
        for part in (encoder, projector):
            speed_up_linear_layers(part)
        return cls(encoder.requires_grad_(False), projector.requires_grad_(False), bundle.chunk_tokens)

    @property
    def encoder_width(self) -> int:
        """Numbers of a chunk embedding."""
        return self.encoder.width

    @torch.no_grad()
    def embed(self, blocks: Sequence[Sequence[int]]) -> list[Tensor]:
        """Chunk embeddings of each block (token ids), float32 [m, encoder_width], m = ceil(n / k).

        Raises InvalidRequestError for an empty block or a token outside the vocabulary.
        """
        if any(len(block) == 0 for block in blocks):
            raise InvalidRequestError("token_ids", "a block needs at least one token")
        bounds = [chunk_bounds(len(block), self.chunk_tokens) for block in blocks]
        chunks = [block[start:end] for block, pieces in zip(blocks, bounds, strict=True) for start, end in pieces]
        if not chunks:
            return []
        step = max(1, _BATCH_TOKENS // self.chunk_tokens)
        found = [self.encoder(chunks[first : first + step]) for first in range(0, len(chunks), step)]
        return list(torch.cat(found).split([len(pieces) for pieces in bounds]))

    @torch.no_grad()
    def project(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Input embeddings of the decoder for each block's chunk embeddings, [m, decoder_width].

        Raises InvalidRequestError for embeddings of another width, without a chunk, or with NaN or infinity.
        """
        width = self.projector.first.in_features
        for found in embeddings:
            if found.ndim != 2 or found.shape[0] == 0 or found.shape[1] != width:
                raise InvalidRequestError("embeddings", f"{list(found.shape)} where [chunks, {width}] is needed")
            if not bool(torch.isfinite(found).all()):
                raise InvalidRequestError("embeddings", "NaN or infinity in a chunk embedding")
        if not embeddings:
            return []
        device = self.projector.first.weight.device
        rows = torch.cat([found.to(device, torch.float32) for found in embeddings])
        return list(self.projector(rows).split([len(found) for found in embeddings]))


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
