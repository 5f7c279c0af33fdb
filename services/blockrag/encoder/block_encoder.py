"""What the encoder accepts, and the forward passes that it batches."""

from __future__ import annotations

from collections import Counter as TallyOfForms
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockrag.encoder.batcher import Batcher
from blockrag.encoder.forms import FormEncoder
from blockrag.errors import InvalidRequestError
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.telemetry.metrics import ENCODED_TOKENS, Counter, Histogram
from blockrag.types import FULL, BlockForm, BlockRequest, CachedBlock

BATCH_BUCKETS_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

ENCODE_BATCH_TOKENS = Histogram(
    "blockrag_encode_batch_tokens", "Tokens of an encoder's forward pass.", buckets=BATCH_BUCKETS_TOKENS
)
ENCODED_BLOCKS = Counter("blockrag_encoded_blocks", "Blocks encoded.", ("form",))


class BlockEncoder:
    """Encodes blocks, in any form, in batches of a bounded number of tokens, on one thread of its own."""

    def __init__(
        self,
        model: SlotModel,
        compressor: ChunkCompressor | None = None,
        *,
        max_batch_tokens: int,
        batch_wait_ms: float,
        threads: int,
    ) -> None:
        """``compressor``: for the compressed forms; None where the bundle has none."""
        self.model = model
        self._forms = FormEncoder(model, compressor)
        executor = ThreadPoolExecutor(
            1, thread_name_prefix="encoder", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._batcher: Batcher[BlockRequest, CachedBlock] = Batcher(
            self._forward, max_size=max_batch_tokens, wait_s=batch_wait_ms / 1000, executor=executor
        )
        self.stats = self._batcher.stats

    def check(self, token_ids: NDArray[np.integer[Any]], form: BlockForm = FULL, *, block: str = "") -> None:
        """Raises ``InvalidRequestError`` for a block that cannot be encoded; ``block`` names it, like "blocks[2].".

        Checked before batching, so that one caller's mistake does not fail the others of its batch.
        """
        self._forms.check_form(form, f"{block}form")
        field, vocab_size, positions = f"{block}token_ids", self.model.vocab_size, self.model.max_positions
        if token_ids.ndim != 1 or not token_ids.size:
            raise InvalidRequestError(field, "a block needs at least one token")
        if token_ids.size > positions:
            raise InvalidRequestError(field, f"{token_ids.size} tokens, where the model has {positions} positions")
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size:
            raise InvalidRequestError(field, f"outside the vocabulary of {vocab_size} tokens")

    async def encode(self, request: BlockRequest) -> CachedBlock:
        """The block in its form, in arrays of its own."""
        self.check(request.token_ids, request.form)
        return await self._batcher.submit(request, int(request.token_ids.size))

    def _forward(self, requests: Sequence[BlockRequest]) -> list[CachedBlock]:
        encoded = self._forms.encode(requests)
        tokens = sum(int(request.token_ids.size) for request in requests)
        ENCODE_BATCH_TOKENS.observe(tokens)
        ENCODED_TOKENS.inc(tokens)
        for form, blocks in TallyOfForms(str(request.form) for request in requests).items():
            ENCODED_BLOCKS.inc(blocks, form=form)
        return encoded
