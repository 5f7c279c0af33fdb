"""Plans in the gateway's process."""

from __future__ import annotations

import asyncio
import threading

import pytest

from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.errors import InvalidRequestError, PromptTooLongError
from blockrag.gateway.planning import InProcessPlanner
from blockrag.modeling.bundle import DEFAULT_BUNDLE, load_bundle
from blockrag.v1.common_pb2 import ATTENTION_MODE_BLOCK, Passage
from blockrag.v1.compressor_pb2 import PlanRequest

BUNDLE = load_bundle(DEFAULT_BUNDLE, verify_files=False)


def planner() -> Planner:
    return Planner(PassageTokenizer(BUNDLE.load_tokenizer(), BUNDLE.template), BUNDLE.max_context_tokens, 16)


def request(*texts: str, max_tokens: int = 8) -> PlanRequest:
    return PlanRequest(
        question="Where is Oslo?",
        passages=[Passage(passage_id=str(place), title="Norway", text=text) for place, text in enumerate(texts)],
        attention_mode=ATTENTION_MODE_BLOCK,
        max_tokens=max_tokens,
    )


async def test_plans_are_the_compressors() -> None:
    asked = request("Oslo is the capital of Norway.", "Bergen rains.")
    assert await InProcessPlanner(planner()).plan(asked) == planner().plan(asked)


async def test_errors_are_the_compressors() -> None:
    in_process = InProcessPlanner(planner())
    with pytest.raises(InvalidRequestError, match="has no text"):
        await in_process.plan(request(""))
    with pytest.raises(PromptTooLongError):
        await in_process.plan(request("Oslo.", max_tokens=10**6))


async def test_long_plans_leave_the_event_loop_free() -> None:
    """Other answers stream on while the passages of one are being tokenised."""
    entered, leave = threading.Event(), threading.Event()

    class Held(Planner):
        def plan(self, request: PlanRequest):  # type: ignore[no-untyped-def]
            entered.set()
            assert leave.wait(10)
            return super().plan(request)

    made = planner()
    held = Held(made._tokenizer, BUNDLE.max_context_tokens, 16)
    plan = asyncio.create_task(InProcessPlanner(held).plan(request("Oslo.")))
    async with asyncio.timeout(10):
        while not entered.is_set():  # noqa: ASYNC110  (set by another thread)
            await asyncio.sleep(0.001)
    leave.set()
    assert (await plan).passages[0].in_prompt
