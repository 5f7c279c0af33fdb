"""The way of a sequence's events from the engine's thread to a coroutine."""

from __future__ import annotations

import asyncio
import threading

from blockrag.decoder.sequence import Event


class TokenStream:
    """What one coroutine reads, by ``push`` as an ``EventSink``.

    Events that a slow reader has not taken are merged into one, so what is kept is bounded by the text itself and a
    reader that comes back late catches up with a single message.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pending: list[Event] = []
        self._waking = False
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: Event) -> None:
        """Add an event; from any thread. Raises ``RuntimeError`` when the reader's loop is closed."""
        with self._lock:
            self._pending.append(event)
            wake, self._waking = not self._waking, True
        if wake:
            self._loop.call_soon_threadsafe(self._wake)

    async def read(self) -> Event:
        """The next event; raises the sequence's error once the text before it was read."""
        while True:
            with self._lock:
                event = self._take()
            if event is not None:
                if event.error is not None:
                    raise event.error
                return event
            # No event can be missed here: _wake runs in this loop, so not before the next line has run.
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self) -> Event | None:
        taken = [event for event in self._pending if event.error is None]
        self._pending = [event for event in self._pending if event.error is not None]
        if not taken:  # an error stays: every further read raises it again
            return self._pending[0] if self._pending else None
        return Event("".join(event.text for event in taken), sum(event.tokens for event in taken), taken[-1].finish)

    def _wake(self) -> None:
        with self._lock:
            self._waking = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
