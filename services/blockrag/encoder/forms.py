"""Blocks in any of their forms: a full pass, a pass over chunk embeddings, the embeddings themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from blockrag.errors import DataError, InvalidRequestError
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.types import FULL, BlockForm, BlockRequest, CachedBlock, ChunkEmbeddings


class FormEncoder:
    """A bundle's decoder and, when it can compress, its chunk encoder. Not thread-safe: one thread computes."""

    def __init__(self, model: SlotModel, compressor: ChunkCompressor | None = None) -> None:
        self.model = model
        self._compressor = compressor

    def check_form(self, form: BlockForm, field: str = "form") -> None:
        """Raises ``InvalidRequestError`` for a form that this bundle's blocks do not have."""
        if form == FULL:
            return
        if self._compressor is None:
            raise InvalidRequestError(field, f"is {form}; the bundle has no chunk encoder")
        if form.chunk_tokens != self._compressor.chunk_tokens:
            raise InvalidRequestError(
                field, f"is {form}; the bundle's chunks have {self._compressor.chunk_tokens} tokens"
            )

    def encode(self, requests: Sequence[BlockRequest]) -> list[CachedBlock]:
        """The blocks, in order, in arrays of their own: one pass for those of each form.

        Raises what ``check_form`` and the models raise, and ``DataError`` for chunk embeddings that are no numbers.
        """
        for request in requests:
            self.check_form(request.form)
        by_kind: dict[str, list[int]] = {"full": [], "compressed": [], "chunks": []}
        for place, request in enumerate(requests):
            by_kind[request.form.kind].append(place)
        encoded: dict[int, CachedBlock] = {}
        if by_kind["full"]:
            token_ids, keys = _parts([requests[place] for place in by_kind["full"]])
            encoded.update(zip(by_kind["full"], self.model.encode(token_ids, keys), strict=True))
        compressing = by_kind["compressed"] + by_kind["chunks"]
        if compressing:
            found = dict(zip(compressing, self._embed([requests[place] for place in compressing]), strict=True))
            encoded.update((place, _embeddings_of(requests[place], found[place])) for place in by_kind["chunks"])
            if by_kind["compressed"]:
                assert self._compressor is not None
                inputs = self._compressor.project([found[place] for place in by_kind["compressed"]])
                token_ids, keys = _parts([requests[place] for place in by_kind["compressed"]])
                passes = self.model.encode_embeddings(inputs, token_ids, keys)
                encoded.update(zip(by_kind["compressed"], passes, strict=True))
        return [encoded[place] for place in range(len(requests))]

    def _embed(self, requests: Sequence[BlockRequest]) -> list[Tensor]:
        """Chunk embeddings of each; a block that is wanted in two forms is embedded once."""
        assert self._compressor is not None
        places: dict[bytes, int] = {}
        blocks: list[list[int]] = []
        for request in requests:
            if places.setdefault(request.token_ids.tobytes(), len(blocks)) == len(blocks):
                blocks.append(request.token_ids.tolist())
        embedded = self._compressor.embed(blocks)
        for found in embedded:
            if not bool(found.isfinite().all()):
                raise DataError("a chunk's embedding is NaN or infinite")
        return [embedded[places[request.token_ids.tobytes()]] for request in requests]


def _parts(requests: Sequence[BlockRequest]) -> tuple[list[list[int]], list[str]]:
    return [request.token_ids.tolist() for request in requests], [request.key for request in requests]


def _embeddings_of(request: BlockRequest, found: Tensor) -> ChunkEmbeddings:
    own = np.array(found.cpu().numpy(), dtype=np.float32, order="C")
    return ChunkEmbeddings(request.key, request.token_ids.astype(np.int32), own)
