"""A run of ``blockrag eval compression`` written down."""

from __future__ import annotations

from dataclasses import dataclass

from blockrag.evaluation.compression_scores import CompressionScores
from blockrag.evaluation.intervals import Interval
from blockrag.evaluation.report import AnswersReport, percent, section


@dataclass(frozen=True, kw_only=True)
class CompressionReport(AnswersReport):
    """Everything that a run's tables say, and what is needed to repeat it."""

    bundle: str
    version: str
    fingerprint: str
    compression: str
    """Fingerprint of decoder, chunk encoder and projector."""
    chunk_tokens: int
    policies: tuple[str, ...]
    text: str
    """Empty where no paragraphs were predicted."""
    results: CompressionScores

    def to_markdown(self) -> str:
        """The report as tables."""
        return "\n".join(
            [*self._head(), *self._questions(), *self._differences(), *self._text(), *self._text_differences()]
        )

    def _head(self) -> list[str]:
        return [
            f"# Compression: {self.bundle} {self.version}, chunks of {self.chunk_tokens} tokens",
            "",
            f"Policies: {', '.join(self.policies) or 'none'}. A rate is how many of the passages' tokens stand for one "
            f"slot; a selector says which chunks are expanded within it. Answers: {self.asked}; paragraphs in float32. "
            "Bootstrap 95 % intervals.",
            "",
            *self.facts(f"fingerprint `{self.fingerprint}`, compression `{self.compression}`"),
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


def _nats(value: Interval, *, sign: bool = False) -> str:
    form = "{:+.4f}" if sign else "{:.4f}"
    mean, low, high = (form.format(number) for number in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"
