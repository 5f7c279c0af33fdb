"""Greedy answers behind prepared slot lists, many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from blockrag.modeling.model import SlotModel
from blockrag.modeling.slots import SequenceState

BATCH_TOKENS = 4096
"""Tokens of one forward pass: beyond, the linear layers gain nothing on a CPU."""
_RUNNING_BYTES = 512 * 2**20
"""K and V of the sequences that are decoded together."""


@dataclass(frozen=True)
class Job:
    """One prompt."""

    slots: int
    """Slots, or tokens to be prefilled, of the passages: shorter prompts go first."""
    fresh: Sequence[int]
    """Tokens that are prefilled behind the slot list."""
    start: Callable[[int], SequenceState]
    """Makes the slot list; given how many further slots it must hold. Called when the prompt's turn comes."""


def answer_jobs(
    model: SlotModel, tokenizer: PreTrainedTokenizerFast, jobs: Sequence[Job], max_answer_tokens: int
) -> list[str]:
    """The answers' texts, in the order of ``jobs``; nothing of their slot lists is kept."""
    waiting = deque(sorted(range(len(jobs)), key=lambda number: jobs[number].slots))
    room = max(1, _RUNNING_BYTES // model.slot_bytes)
    running: list[_Running] = []
    answers = [""] * len(jobs)
    while waiting or running:
        work: list[tuple[SequenceState, Sequence[int]]] = [(one.state, one.ids[-1:]) for one in running]
        fresh = 0
        while waiting:
            job = jobs[waiting[0]]
            slots = sum(one.state.capacity for one in running)
            if work and (fresh + len(job.fresh) > BATCH_TOKENS or slots + job.slots > room):
                break
            state = job.start(len(job.fresh) + max_answer_tokens)
            running.append(_Running(waiting.popleft(), state))
            work.append((state, job.fresh))
            fresh += len(job.fresh)
        found = model.forward(work).argmax(dim=-1).tolist()
        going: list[_Running] = []
        for one, token in zip(running, found, strict=True):
            if token not in model.end_token_ids:
                one.ids.append(token)
                if len(one.ids) < max_answer_tokens:
                    going.append(one)
                    continue
            one.state.release()
            answers[one.number] = tokenizer.decode(one.ids, skip_special_tokens=True).strip()
        running = going
    return answers


@dataclass
class _Running:
    """A sequence that is being decoded."""

    number: int
    state: SequenceState
    ids: list[int] = field(default_factory=list)
