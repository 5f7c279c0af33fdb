"""The engine against a model whose next token is the last one plus one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blockrag.decoder.engine import Engine
from blockrag.decoder.scheduler import EngineLimits
from blockrag.decoder.sequence import GenerationRequest, SamplingParams, Sequence
from blockrag.decoder.service import check_engine
from blockrag.errors import (
    BlockragError,
    DataError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    UnavailableError,
)
from tests.unit.decoder.fakes import (
    END,
    VOCAB,
    CollectingSink,
    FakeBlock,
    FakeModel,
    LetterDetokenizer,
    letters,
    wait_until,
)


class Bench:
    """An engine with its model, and what was released."""

    def __init__(self, **limits: int) -> None:
        self.model = FakeModel()
        fields = {"max_sequences": 4, "max_waiting": 2, "max_batch_tokens": 32, "slots": 1000, **limits}
        self.engine = Engine(self.model, EngineLimits(**fields), LetterDetokenizer)  # type: ignore[arg-type]
        self.released: list[str] = []

    def submit(
        self,
        tokens: list[int],
        *,
        name: str = "r",
        blocks: int = 0,
        max_tokens: int = 5,
        stop: tuple[str, ...] = (),
        deadline: float | None = None,
    ) -> tuple[Sequence, CollectingSink]:
        sink = CollectingSink()
        request = GenerationRequest(
            name,
            tuple(FakeBlock(str(number)) for number in range(blocks)),  # type: ignore[misc]
            tuple(tokens),
            SamplingParams(max_tokens=max_tokens, stop=stop),
            deadline,
            released=lambda: self.released.append(name),
        )
        return self.engine.submit(request, sink.push), sink

    def run(self) -> int:
        steps = 0
        while self.engine.step():
            steps += 1
        return steps


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def started(bench: Bench) -> Iterator[Bench]:
    bench.engine.start()
    yield bench
    bench.model.gate.set()
    bench.engine.stop()


def test_an_answer_ends_at_max_tokens(bench: Bench) -> None:
    _, sink = bench.submit([3, 10], blocks=2, max_tokens=4)
    bench.run()
    assert sink.text == letters(11, 4)
    finish = sink.events[-1].finish
    assert finish is not None
    assert (finish.reason, finish.completion_tokens) == ("length", 4)
    assert sum(event.tokens for event in sink.events) == 4
    assert bench.model.states[0].capacity == 2 * 4 + 2 + 4


def test_the_token_that_ends_an_answer_is_not_counted(bench: Bench) -> None:
    _, sink = bench.submit([END - 3], max_tokens=50)
    bench.run()
    finish = sink.events[-1].finish
    assert finish is not None
    assert (finish.reason, finish.completion_tokens, sink.text) == ("end", 2, letters(END - 2, 2))


def test_a_stop_string_over_several_tokens_is_cut_off(bench: Bench) -> None:
    _, sink = bench.submit([10], max_tokens=50, stop=(letters(14, 3),))
    bench.run()
    finish = sink.events[-1].finish
    assert finish is not None
    assert (finish.reason, finish.completion_tokens, sink.text) == ("stop", 6, letters(11, 3))
    assert sum(event.tokens for event in sink.events) == 6


def test_what_was_held_back_comes_at_the_end(bench: Bench) -> None:
    _, sink = bench.submit([10], max_tokens=4, stop=(letters(13, 3),))
    bench.run()
    assert sink.text == letters(11, 4)


def test_sequences_are_stepped_together(bench: Bench) -> None:
    sinks = [bench.submit([first], max_tokens=6)[1] for first in (10, 20, 30)]
    assert bench.run() == 6
    assert bench.model.batches == [[1, 1, 1]] * 6
    assert [sink.text for sink in sinks] == [letters(first + 1, 6) for first in (10, 20, 30)]


def test_a_long_prefill_is_cut_into_pieces_and_stalls_nobody(bench: Bench) -> None:
    _, stream = bench.submit([10], max_tokens=8)
    bench.engine.step()
    _, long = bench.submit([*[1] * 99, 40], max_tokens=1)
    for step in range(2, 6):
        bench.engine.step()
        assert len(stream.text) == step
    assert bench.model.batches[1:5] == [[1, 31], [1, 31], [1, 31], [1, 7]]
    assert long.text == letters(41, 1)


def test_what_a_finished_sequence_held_is_free_again(bench: Bench) -> None:
    bench.submit([10], name="a", blocks=1)
    bench.run()
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting, stats.used_slots) == (0, 0, 0)
    assert stats.generated_tokens == 5
    assert bench.released == ["a"]
    assert bench.model.states[0].released


def test_waiting_requests_follow_when_slots_are_free() -> None:
    bench = Bench(slots=20)
    sinks = [bench.submit([10], max_tokens=15)[1] for _ in range(3)]
    assert bench.engine.stats().waiting == 2
    bench.run()
    assert all(sink.text == letters(11, 15) for sink in sinks)


def test_too_many_requests_are_refused() -> None:
    bench = Bench(max_sequences=1)
    for _ in range(3):
        bench.submit([10])
    with pytest.raises(OverloadedError):
        bench.submit([10])
    with pytest.raises(OverloadedError):
        bench.engine.check(1, 1)
    assert bench.run() == 15
    bench.engine.check(1, 1)
    assert bench.released == ["r"] * 3


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error"),
    [(4096, 1, PromptTooLongError), (4000, 97, InvalidRequestError), (990, 11, InvalidRequestError)],
)
def test_what_does_not_fit_is_refused(bench: Bench, prompt: int, max_tokens: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        bench.submit([1] * prompt, max_tokens=max_tokens)
    assert bench.engine.stats().waiting == 0


def test_a_prompt_without_tokens_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequestError, match="final_token_ids"):
        bench.submit([], blocks=1)


def test_one_broken_sequence_harms_no_other(bench: Bench) -> None:
    bench.model.broken = {50}
    bench.model.nan = {60}
    _, fine = bench.submit([10], name="fine")
    _, broken = bench.submit([50], name="broken")
    _, nan = bench.submit([60], name="nan")
    bench.run()
    assert fine.text == letters(11, 5)
    assert type(broken.events[-1].error) is BlockragError
    assert isinstance(nan.events[-1].error, DataError)
    assert sorted(bench.released) == ["broken", "fine", "nan"]
    assert bench.engine.stats().used_slots == 0


def test_a_reader_that_is_gone_harms_no_other(bench: Bench) -> None:
    class Gone(CollectingSink):
        def push(self, event: object) -> None:
            raise RuntimeError("Event loop is closed")

    request = GenerationRequest("gone", (), (10,), SamplingParams(max_tokens=100))
    bench.engine.submit(request, Gone().push)
    _, fine = bench.submit([20])
    bench.run()
    assert fine.text == letters(21, 5)
    assert len(bench.model.batches[1]) == 1


def test_a_cancelled_sequence_frees_its_slots_at_once(started: Bench) -> None:
    started.model.end_token_ids = frozenset()
    started.model.gate.clear()
    sequence, sink = started.submit([10], max_tokens=900)
    assert started.model.entered.wait(10)
    before = time.monotonic()
    started.engine.cancel(sequence)
    started.model.gate.set()
    wait_until(lambda: started.engine.stats().used_slots == 0)
    assert time.monotonic() - before < 1  # a tenth on a quiet machine
    assert started.released == ["r"]
    assert len(started.model.batches) <= 1
    assert all(event.error is None for event in sink.events)


def test_a_cancelled_waiting_request_leaves_the_queue() -> None:
    bench = Bench(max_sequences=1)
    bench.submit([10], name="running")
    waiting, sink = bench.submit([20], name="waiting")
    bench.engine.cancel(waiting)
    bench.run()
    assert sink.events == []
    assert sorted(bench.released) == ["running", "waiting"]
    assert bench.engine.stats().used_slots == 0


def test_cancelling_a_finished_sequence_does_nothing(bench: Bench) -> None:
    sequence, _ = bench.submit([10])
    bench.run()
    bench.engine.cancel(sequence)
    bench.run()
    assert bench.released == ["r"]


def test_a_deadline_frees_slots_at_once(started: Bench) -> None:
    started.model.end_token_ids = frozenset()
    deadline = time.monotonic() + 0.05
    _, sink = started.submit([10], max_tokens=900, deadline=deadline)
    # Forward passes of this model take microseconds, so hold it until the deadline has passed.
    started.model.gate.clear()
    wait_until(lambda: time.monotonic() >= deadline)
    started.model.gate.set()
    assert sink.done.wait(10)
    assert time.monotonic() - deadline < 1
    assert isinstance(sink.events[-1].error, DeadlineError)
    assert started.engine.stats().used_slots == 0


def test_a_deadline_counts_for_those_that_wait() -> None:
    bench = Bench(max_sequences=1)
    bench.submit([10], name="running")
    _, sink = bench.submit([20], name="waiting", deadline=time.monotonic())
    bench.run()
    assert isinstance(sink.events[-1].error, DeadlineError)


def test_the_thread_sleeps_and_wakes(started: Bench) -> None:
    for first in (10, 20):
        _, sink = started.submit([first])
        assert sink.done.wait(10)
        assert sink.text == letters(first + 1, 5)
    wait_until(lambda: started.engine.stats().running == 0)
    assert len(started.model.batches) == 10


def test_stopping_tells_those_that_are_left(bench: Bench) -> None:
    bench.model.gate.clear()
    bench.engine.start()
    _, sink = bench.submit([10], max_tokens=50)
    _, waiting = bench.submit([10], name="waiting", max_tokens=990)
    assert bench.model.entered.wait(10)
    stopping = threading.Thread(target=bench.engine.stop)
    stopping.start()
    wait_until(lambda: _refuses(bench.engine))
    bench.model.gate.set()
    stopping.join()
    for collected in (sink, waiting):
        assert isinstance(collected.events[-1].error, UnavailableError)
    assert sorted(bench.released) == ["r", "waiting"]


def test_a_failure_of_the_engine_itself_is_known_and_ends_what_runs(bench: Bench) -> None:
    def detokenizer() -> LetterDetokenizer:
        return LetterDetokenizer()

    class Confused(FakeModel):
        def forward(self, work: object) -> torch.Tensor:
            return torch.zeros(5, VOCAB)  # five rows whatever was asked

    engine = Engine(Confused(), EngineLimits(), detokenizer)  # type: ignore[arg-type]
    engine.start()
    sink = CollectingSink()
    engine.submit(GenerationRequest("r", (), (10,), SamplingParams(max_tokens=5)), sink.push)
    assert sink.done.wait(10)
    assert isinstance(sink.events[-1].error, UnavailableError)
    assert engine.failure is not None
    engine.stop()


def _refuses(engine: Engine) -> bool:
    try:
        engine.check(1, 1)
    except UnavailableError:
        return True
    return False


def test_stages_add_up_to_the_time_it_took(bench: Bench) -> None:
    before = time.monotonic()
    _, sink = bench.submit([10])
    bench.run()
    took = time.monotonic() - before
    finish = sink.events[-1].finish
    assert finish is not None
    stages = finish.stages
    assert 0 < stages.queue + stages.compose + stages.prefill + stages.decode <= took


@pytest.mark.parametrize(("cost", "threads"), [(1_000, 1), (10**12, 3)])
def test_small_steps_take_one_thread(cost: int, threads: int) -> None:
    seen: list[int] = []

    class Measured(FakeModel):
        def multiply_adds(self, work: list[tuple[object, int]]) -> int:
            assert [tokens for _, tokens in work] == [1]
            return cost

        def forward(self, work: Any) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(work)

    limits = EngineLimits(max_sequences=4, max_waiting=2, max_batch_tokens=32, slots=1000)
    engine = Engine(Measured(), limits, LetterDetokenizer, threads=3)  # type: ignore[arg-type]
    engine.start()
    sink = CollectingSink()
    engine.submit(GenerationRequest("r", (), (10,), SamplingParams(max_tokens=3)), sink.push)
    assert sink.done.wait(10)
    engine.stop()
    assert seen
    assert set(seen) == {threads}


def test_a_step_that_does_not_return_is_seen_and_given_up() -> None:
    bench = Bench()
    bench.model.gate.clear()
    bench.engine.start()
    try:
        check_engine(bench.engine, 0.0)
        _, sink = bench.submit([1])
        assert bench.model.entered.wait(10)
        check_engine(bench.engine, 60.0)
        wait_until(lambda: bench.engine.step_seconds > 0.01)
        with pytest.raises(RuntimeError, match="thread failed"):
            check_engine(bench.engine, 0.01)
        assert sink.done.wait(10)
        assert isinstance(sink.events[-1].error, UnavailableError)
        with pytest.raises(UnavailableError):
            bench.submit([1])
        began = time.monotonic()
        bench.engine.stop()
        assert time.monotonic() - began < 5
    finally:
        bench.model.gate.set()
