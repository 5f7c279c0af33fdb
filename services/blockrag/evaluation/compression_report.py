"""A run of ``blockrag eval compression`` written down: one JSON object, one Markdown page, every answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blockrag.evaluation.compression import Answers, Cell
from blockrag.evaluation.compression_scores import CompressionScores
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.environment import Environment
from blockrag.evaluation.intervals import Interval
from blockrag.evaluation.markdown import percent, section

FORMAT = 1


@dataclass(frozen=True)
class CompressionReport:
    """Everything that a run's tables say, and what is needed to repeat it."""

    bundle: str
    version: str
    fingerprint: str
    compression: str
    """Fingerprint of decoder, chunk encoder and projector."""
    chunk_tokens: int
    policies: tuple[str, ...]
    data: str
    """Empty where no questions were asked."""
    text: str
    """Empty where no paragraphs were predicted."""
    sha256: Mapping[str, str]
    """Of every data file that was read."""
    passages: int
    distractors: str
    max_answer_tokens: int
    seed: int
    seconds: float
    results: CompressionScores
    environment: Environment

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The report as tables."""
        return "\n".join(
            [*self._head(), *self._questions(), *self._differences(), *self._text(), *self._text_differences()]
        )

    def _head(self) -> list[str]:
        files = [f"- {name}: SHA-256 `{digest}`" for name, digest in self.sha256.items()]
        return [
            f"# Compression: {self.bundle} {self.version}, chunks of {self.chunk_tokens} tokens",
            "",
            f"Policies: {', '.join(self.policies) or 'none'}. A rate is how many of the passages' tokens stand for one "
            f"slot; a selector says which chunks are expanded within it. Greedy, at most {self.max_answer_tokens} "
            f"tokens, seed {self.seed}, bootstrap 95 % intervals.",
            "",
            f"- {self.environment.source}, {self.environment.date}, {self.environment.cpu}, {self.environment.device}, "
            f"{self.seconds:.0f} s",
            f"- fingerprint `{self.fingerprint}`, compression `{self.compression}`",
            *files,
            "",
        ]

    def _questions(self) -> list[str]:
        rows = [
            [
                f"{one.rate:g}",
                f"{one.selector}, re-encoded" if one.reencoded else one.selector,
                f"{one.slots:.0f}",
                f"{one.effective_rate:.2f}",
                *map(percent, (one.exact_match, one.f1, one.contained)),
                *(percent(value) if value else "–" for value in (one.numeric, one.other)),
            ]
            for one in self.results.scores
        ]
        header = ["rate", "expanded by", "slots", "effective", "exact match", "F1", "contained", "numbers", "others"]
        title = (
            f"{self.data}: {self.results.questions} questions with {self.passages} passages ({self.distractors}), "
            f"{self.results.numeric} with a number for an answer; percent"
        )
        return section(title, header, rows)

    def _differences(self) -> list[str]:
        rows = [
            [
                f"{one.rate:g}",
                one.first,
                one.second,
                *(percent(value, sign=True) for value in (one.exact_match, one.f1, one.contained)),
                percent(one.numeric, sign=True) if one.numeric else "–",
            ]
            for one in self.results.differences
        ]
        return section(
            "Paired differences: first minus second, points",
            ["rate", "first", "second", "exact match", "F1", "contained", "numbers"],
            rows,
        )

    def _text(self) -> list[str]:
        rows = [
            [
                "–" if one.effective_rate is None else f"{one.rate:g}",
                one.selector,
                f"{one.slots:.0f}",
                "–" if one.effective_rate is None else f"{one.effective_rate:.2f}",
                _nats(one.nats),
                percent(one.recovered) if one.recovered else "–",
            ]
            for one in self.results.text
        ]
        return section(
            f"{self.text}: next paragraph, {self.results.paragraphs} targets; nats per token",
            ["rate", "expanded by", "slots", "effective", "log-perplexity", "gap recovered, %"],
            rows,
        )

    def _text_differences(self) -> list[str]:
        rows = [
            [f"{one.rate:g}", one.first, one.second, _nats(one.nats, sign=True)]
            for one in self.results.text_differences
        ]
        return section(
            "Next paragraph, paired: first minus second, nats per token (below 0 the first is better)",
            ["rate", "first", "second", "log-perplexity"],
            rows,
        )


def compression_lines(questions: Sequence[DrawnQuestion], answers: Mapping[Cell, Answers]) -> str:
    """One JSON line per question with the answers and slots of all cells, by "rate, selector"."""
    lines: list[dict[str, Any]] = [
        {
            "id": question.source.id,
            "question": question.source.text,
            "answers": question.source.answers,
            "outputs": {f"{cell.rate:g}, {cell.label}": found.outputs[number] for cell, found in answers.items()},
            "slots": {f"{cell.rate:g}, {cell.label}": int(found.slots[number]) for cell, found in answers.items()},
        }
        for number, question in enumerate(questions)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _nats(value: Interval, *, sign: bool = False) -> str:
    form = "{:+.4f}" if sign else "{:.4f}"
    mean, low, high = (form.format(number) for number in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"
