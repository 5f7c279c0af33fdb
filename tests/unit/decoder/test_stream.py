from __future__ import annotations

import asyncio
import threading

import pytest

from blockrag.decoder.sequence import Event, Finish, StageSeconds, TokenStream
from blockrag.errors import DeadlineError

_FINISH = Finish("end", 3, StageSeconds(0, 0, 0, 0))


async def test_a_reader_gets_what_another_thread_pushes() -> None:
    stream = TokenStream()
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0)
    threading.Thread(target=stream.push, args=(Event("a", 1),)).start()
    assert await reading == Event("a", 1)


async def test_what_a_slow_reader_missed_is_one_event() -> None:
    stream = TokenStream()
    for event in (Event("a", 1), Event("b", 2), Event("", 0, _FINISH)):
        stream.push(event)
    assert await stream.read() == Event("ab", 3, _FINISH)


async def test_an_error_comes_after_the_text_before_it() -> None:
    stream = TokenStream()
    stream.push(Event("a", 1))
    stream.push(Event(error=DeadlineError("late")))
    assert (await stream.read()).text == "a"
    for _ in range(2):
        with pytest.raises(DeadlineError):
            await stream.read()


async def test_a_cancelled_read_loses_nothing() -> None:
    stream = TokenStream()
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    stream.push(Event("a", 1))
    assert (await stream.read()).text == "a"


async def test_many_pushes_from_a_thread_arrive_in_order() -> None:
    stream = TokenStream()

    def push() -> None:
        for number in range(500):
            stream.push(Event(f"{number} ", 1))
        stream.push(Event("", 0, _FINISH))

    thread = threading.Thread(target=push)
    thread.start()
    text, tokens = "", 0
    while True:
        event = await stream.read()
        text, tokens = text + event.text, tokens + event.tokens
        if event.finish is not None:
            break
    thread.join()
    assert text == "".join(f"{number} " for number in range(500))
    assert tokens == 500


def test_pushing_after_the_loop_closed_raises() -> None:
    loop = asyncio.new_event_loop()
    stream = TokenStream(loop)
    loop.close()
    with pytest.raises(RuntimeError):
        stream.push(Event("a", 1))
