"""A run of ``blockrag eval qa`` written down."""

from __future__ import annotations

from dataclasses import dataclass

from blockrag.evaluation.qa_scores import QaScores
from blockrag.evaluation.report import AnswersReport, percent, section, table


@dataclass(frozen=True)
class SystemFacts:
    """Which weights answered."""

    label: str
    bundle: str
    version: str
    fingerprint: str
    pear: bool
    """Whether the bundle's PEAR coefficients were folded."""


@dataclass(frozen=True, kw_only=True)
class QaReport(AnswersReport):
    """Everything that a run's tables say, and what is needed to repeat it."""

    questions: int
    without_gold: int
    """Questions passed over, because the file names no answer or no gold passage for them."""
    answer_in_gold: int
    """Questions whose gold piece holds an answer word for word."""
    passage_tokens: int
    systems: tuple[SystemFacts, ...]
    results: QaScores

    def to_markdown(self) -> str:
        """The report as tables."""
        return "\n".join([*self._head(), *self._scores(), *self._differences(), *self._refusals(), *self._groups()])

    def _head(self) -> list[str]:
        systems = [
            f"{one.label}: bundle {one.bundle} {one.version}, fingerprint `{one.fingerprint}`"
            + (", PEAR folded" if one.pear else "")
            for one in self.systems
        ]
        return [
            f"# {self.data}: {self.questions} questions",
            "",
            f"{self.passages} passages of at most {self.passage_tokens} tokens, distractors: {self.distractors}, "
            f"{self.asked}. Percent with bootstrap 95 % intervals "
            f"over questions. {self.answer_in_gold} gold pieces hold an answer word for word; {self.without_gold} "
            f"questions without answer or gold passage were passed over.",
            "",
            *self.facts(*systems),
        ]

    def _scores(self) -> list[str]:
        rows = [
            [one.system, one.mode, one.condition, *map(percent, (one.exact_match, one.f1, one.contained, one.refused))]
            for one in self.results.scores
        ]
        return table(["system", "mode", "shown", "exact match", "F1", "contained", "refused"], rows)

    def _differences(self) -> list[str]:
        rows = [
            [
                one.first,
                one.second,
                one.condition,
                *(percent(value, sign=True) for value in (one.exact_match, one.f1, one.contained)),
            ]
            for one in self.results.differences
        ]
        return section(
            "Paired differences: first minus second, points",
            ["first", "second", "shown", "exact match", "F1", "contained"],
            rows,
        )

    def _refusals(self) -> list[str]:
        rows = [
            [
                one.system,
                one.mode,
                str(one.questions),
                percent(one.precision) if one.precision else "–",
                percent(one.recall),
                percent(one.wrong),
            ]
            for one in self.results.refusals
        ]
        return section(
            "Refusals: the same questions with and without the gold passage",
            ["system", "mode", "questions", "precision", "recall", "wrongly refused"],
            rows,
        )

    def _groups(self) -> list[str]:
        groups = self.results.by_group
        if not groups:
            return []
        columns = [name for name in next(iter(groups.values())) if name != "questions"]
        rows = [
            [name, f"{values['questions']:.0f}", *(f"{100 * values[column]:.1f}" for column in columns)]
            for name, values in sorted(groups.items(), key=lambda item: -item[1]["questions"])
        ]
        return section("Exact match by group", ["group", "questions", *columns], rows)
