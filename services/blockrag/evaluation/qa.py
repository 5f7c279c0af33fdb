"""Question answering over drawn passages, mode by mode: ``evaluate_qa``.

Every mode and every condition (number of passages, place of the gold one, gold absent) is asked the same questions
with the same passages, so that all differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockrag.evaluation.answering import Mode, Prompt, SlotReader
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.pieces import Piece

_CHUNK = 64
"""Questions answered in all modes before the next are encoded: their blocks fit what a reader keeps."""


@dataclass(frozen=True)
class System:
    """A bundle, loaded, under a name of its own within the run."""

    label: str
    reader: SlotReader


@dataclass(frozen=True)
class Condition:
    """What is shown with every question."""

    passages: int
    place: int | None = None
    """Index of the gold passage; None: drawn for each question."""
    gold: bool = True
    """Whether the gold passage is there."""

    @property
    def label(self) -> str:
        if not self.passages:
            return "no passages"
        shown = f"{self.passages} passage{'s' if self.passages > 1 else ''}"
        if not self.gold:
            return f"{shown}, gold absent"
        return shown if self.place is None else f"{shown}, gold at {self.place + 1}"


NO_PASSAGES = Condition(0, gold=False)


@dataclass(frozen=True)
class Cell:
    """One line of answers: who was asked, how, with what shown."""

    system: str
    mode: Mode
    condition: Condition


@dataclass(frozen=True)
class QaPlan:
    """What a run asks."""

    passages: int
    """Passages of the main condition."""
    modes: tuple[Mode, ...]
    counts: tuple[int, ...] = ()
    """Further numbers of passages."""
    places: tuple[int, ...] = ()
    """Indices of the gold passage among ``passages``."""
    absent: bool = True
    """Ask also without the gold passage."""

    @property
    def main(self) -> Condition:
        return Condition(self.passages)

    @property
    def most_passages(self) -> int:
        return max((self.passages, *self.counts))

    def conditions(self, mode: Mode) -> Iterator[Condition]:
        """What ``mode`` is asked under; without passages there is nothing to vary."""
        if mode == "none":
            yield NO_PASSAGES
            return
        yield self.main
        if self.absent:
            yield Condition(self.passages, gold=False)
        for count in self.counts:
            if count != self.passages:
                yield Condition(count)
        for place in self.places:
            yield Condition(self.passages, place)


def evaluate_qa(
    questions: Sequence[DrawnQuestion],
    systems: Sequence[System],
    plan: QaPlan,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Cell, list[str]]:
    """Greedy answers of every cell, in the order of ``questions``.

    ``progress`` is called with how many answers are there and how many there will be.
    """
    cells = [
        Cell(system.label, mode, condition)
        for system in systems
        for mode in plan.modes
        for condition in plan.conditions(mode)
    ]
    readers: Mapping[str, SlotReader] = {system.label: system.reader for system in systems}
    answers = {cell: [""] * len(questions) for cell in cells}
    done = 0
    # Questions about one table show the same articles: neighbours share encoded blocks.
    order = sorted(range(len(questions)), key=lambda number: questions[number].source.same_kind[:1])
    for start in range(0, len(order), _CHUNK):
        numbers = order[start : start + _CHUNK]
        for cell in cells:
            prompts = [make_prompt(questions[number], cell.condition) for number in numbers]
            found = readers[cell.system].answer(prompts, cell.mode)
            for number, answer in zip(numbers, found, strict=True):
                answers[cell][number] = answer
            done += len(numbers)
            if progress is not None:
                progress(done, len(cells) * len(questions))
    return answers


def make_prompt(question: DrawnQuestion, condition: Condition) -> Prompt:
    """A question under a condition."""
    if not condition.passages:
        shown: tuple[Piece, ...] = ()
    elif condition.gold:
        shown = question.passages(condition.passages, condition.place)
    else:
        shown = question.absent
    return Prompt(shown, question.source.text)
