"""What the encoder accepts, and the forward pass that it batches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockrag.encoder.batcher import Batcher
from blockrag.encoder.metrics import record_batch
from blockrag.errors import InvalidRequestError
from blockrag.modeling.model import SlotModel
from blockrag.types import BlockKV, BlockRequest


def check_token_ids(
    token_ids: NDArray[np.integer[Any]], *, vocab_size: int, max_positions: int, field: str = "token_ids"
) -> None:
    """Raises ``InvalidRequestError`` for what no forward pass can take.

    Checked before batching, so that one caller's mistake does not fail the others of its batch.
    """
    if token_ids.ndim != 1 or not token_ids.size:
        raise InvalidRequestError(field, "a block needs at least one token")
    if token_ids.size > max_positions:
        raise InvalidRequestError(field, f"{token_ids.size} tokens, where the model has {max_positions} positions")
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size:
        raise InvalidRequestError(field, f"outside the vocabulary of {vocab_size} tokens")


class BlockEncoder:
    """Encodes blocks in batches of a bounded number of tokens, on one thread of its own."""

    def __init__(self, model: SlotModel, *, max_batch_tokens: int, batch_wait_ms: float, threads: int) -> None:
        self.model = model
        executor = ThreadPoolExecutor(
            1, thread_name_prefix="encoder", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._batcher: Batcher[BlockRequest, BlockKV] = Batcher(
            self._forward, max_size=max_batch_tokens, wait_s=batch_wait_ms / 1000, executor=executor
        )
        self.stats = self._batcher.stats

    def check(self, token_ids: NDArray[np.integer[Any]], *, field: str = "token_ids") -> None:
        """Raises ``InvalidRequestError`` for a block that cannot be encoded."""
        model = self.model
        check_token_ids(token_ids, vocab_size=model.vocab_size, max_positions=model.max_positions, field=field)

    async def encode(self, request: BlockRequest) -> BlockKV:
        """The block's KV, in arrays of its own."""
        self.check(request.token_ids)
        return await self._batcher.submit(request, int(request.token_ids.size))

    def _forward(self, requests: Sequence[BlockRequest]) -> list[BlockKV]:
        blocks = [request.token_ids.tolist() for request in requests]
        encoded = self.model.encode(blocks, [request.key for request in requests])
        record_batch([len(block) for block in blocks])
        return encoded
