"""Compression at inference: blocks to chunk embeddings, and those to input embeddings of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockrag.budget import chunk_bounds
from blockrag.errors import InvalidRequestError
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.matmul import speed_up_linear_layers
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.projector import Projector

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
        width = self.projector.encoder_width
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
