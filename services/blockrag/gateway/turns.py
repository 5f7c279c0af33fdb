"""Encodes an answered turn while its user reads the answer, so that the next question finds it cached."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from blockrag.gateway.validation import Question
from blockrag.handles import KvCacheClient
from blockrag.telemetry import request_fields
from blockrag.v1.common_pb2 import ATTENTION_MODE_FULL, PromptBlock, RequestContext
from blockrag.v1.kv_cache_pb2 import WarmBlocksRequest

_logger = logging.getLogger(__name__)

Which = Literal["never", "conversations", "always"]

_MOST = 16
"""Turns under way; one more is left to the question that needs it."""


class AnsweredTurns:
    """Has the cache encode turns; for one event loop. Nobody waits for it, and what goes wrong costs a later wait."""

    def __init__(self, which: Which, turn_ids: Callable[[str, str], Sequence[int]], cache: KvCacheClient) -> None:
        """``turn_ids``: token ids of the block of a question and its answer, the same that a later plan makes."""
        self._which = which
        self._turn_ids = turn_ids
        self._cache = cache
        self._running: set[asyncio.Task[None]] = set()

    def encode(self, question: Question, answer: str, context: RequestContext) -> None:
        """Starts on the turn of ``question`` and its whole ``answer``, where the settings want that."""
        wanted = self._which == "always" or (self._which == "conversations" and question.turns)
        # in full mode a conversation is prefilled as a whole, and no block of it is read
        if not wanted or not answer or question.attention_mode == ATTENTION_MODE_FULL or len(self._running) >= _MOST:
            return
        own = RequestContext(request_id=context.request_id, tenant=context.tenant)
        # a context of its own: it goes on after the request, whose deadline and span are none of it
        task = asyncio.get_running_loop().create_task(
            self._encode(question.text, answer, own), context=contextvars.Context()
        )
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _encode(self, question: str, answer: str, context: RequestContext) -> None:
        try:
            blocks = [PromptBlock(token_ids=self._turn_ids(question, answer))]
            await self._cache.warm_blocks(WarmBlocksRequest(context=context, blocks=blocks))
        except Exception as error:
            fields = request_fields(context)
            _logger.info("an answered turn was not encoded ahead: %s", error, extra=fields)
