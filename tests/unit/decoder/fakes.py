"""Hand-written stand-ins: a model that counts, a sink that collects, a source that can be held."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from blockrag.decoder.sequence import Event
from blockrag.kv_cache.shard_messages import FetchedBlock, Tier
from blockrag.types import BlockKV, BlockRequest

VOCAB = 100
END = 99


class FakeBlock:
    """A resident block of a given size."""

    def __init__(self, key: str, num_slots: int = 4, nbytes: int = 100) -> None:
        self.key = key
        self.num_slots = num_slots
        self.nbytes = nbytes


class FakeState:
    """A slot list that remembers its tokens."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = num_slots + capacity
        self.tokens: list[int] = []
        self.released = False

    def release(self) -> None:
        self.released = True


class FakeModel:
    """The token after t is t + 1, until ``END``; so an answer is known from its prompt's last token.

    ``hold`` makes forward passes wait for ``gate``; a prompt that starts with a token of ``broken`` makes any batch
    with it fail, one that starts with a token of ``nan`` gets logits that are not finite.
    """

    max_positions = 4096
    vocab_size = VOCAB
    end_token_ids = frozenset({END})
    unused_token_ids = torch.empty(0, dtype=torch.long)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.states: list[FakeState] = []
        self.broken: set[int] = set()
        self.nan: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def new_sequence(self, blocks: Sequence[FakeBlock], capacity: int) -> FakeState:
        state = FakeState(sum(block.num_slots for block in blocks), capacity)
        self.states.append(state)
        return state

    def forward(self, work: Sequence[tuple[FakeState, Sequence[int]]]) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(30)
        for state, tokens in work:
            assert not state.released
            assert state.num_slots + len(tokens) <= state.capacity
            if (state.tokens or list(tokens))[0] in self.broken:
                raise RuntimeError("broken sequence")
        self.batches.append([len(tokens) for _, tokens in work])
        logits = torch.zeros(len(work), VOCAB)
        for row, (state, tokens) in enumerate(work):
            state.tokens.extend(tokens)
            state.num_slots += len(tokens)
            logits[row, min(tokens[-1] + 1, END)] = 10.0
            if state.tokens[0] in self.nan:
                logits[row, 0] = float("nan")
        return logits


class LetterDetokenizer:
    """Token t is the character at place t of the printable ASCII ones."""

    def feed(self, token_id: int) -> str:
        return chr(32 + token_id % 95)


def letters(first: int, count: int) -> str:
    """The text of ``count`` tokens from ``first`` on."""
    return "".join(LetterDetokenizer().feed(token) for token in range(first, first + count))


class CollectingSink:
    """Keeps events; ``done`` is set by the last one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()

    def push(self, event: Event) -> None:
        self.events.append(event)
        if event.finish is not None or event.error is not None:
            self.done.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


class FakeSource:
    """Answers with zeros of the right shape; waits for ``gate`` and raises ``error`` when told to."""

    def __init__(self, tier: Tier = "store") -> None:
        self.calls: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.cancelled = 0
        self._tier = tier

    async def fetch(self, requests: list[BlockRequest]) -> list[FetchedBlock]:
        self.calls.append([request.key for request in requests])
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [FetchedBlock(block_kv(request.key, len(request.token_ids)), self._tier) for request in requests]

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        return [self._tier] * len(keys)


def block_kv(key: str, num_slots: int) -> BlockKV:
    """A block of zeros with one layer and one head."""
    zeros = np.zeros((1, 1, num_slots, 2), dtype=np.float32)
    return BlockKV(key, np.zeros(num_slots, dtype=np.int32), zeros, zeros)


def block_request(key: str, num_slots: int = 4) -> BlockRequest:
    """A request for one."""
    return BlockRequest(key, np.zeros(num_slots, dtype=np.int32), tenant="public")


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until it holds; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.001)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """The same inside an event loop."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.001)
