"""Exact match over the place of the gold passage."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from blockrag.errors import SetupError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from blockrag.evaluation.qa_report import QaReport


def load_figure() -> type[Figure]:
    """matplotlib's figure. Raises ``SetupError`` where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("plots need matplotlib: pip install 'blockrag[plots]'") from error
    return Figure


def plot_places(report: QaReport) -> bytes:
    """The curve of every system and mode with its 95 % intervals, as PNG."""
    figure = load_figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    placed = [score for score in report.results.scores if score.place is not None]
    for system, mode in dict.fromkeys((score.system, score.mode) for score in placed):
        line = [score for score in placed if (score.system, score.mode) == (system, mode)]
        places = [score.place + 1 for score in line if score.place is not None]
        axes.plot(places, [100 * score.exact_match.mean for score in line], "o-", label=f"{system}, {mode}")
        low, high = ([100 * getattr(score.exact_match, end) for score in line] for end in ("low", "high"))
        axes.fill_between(places, low, high, alpha=0.15)
    axes.set(xlabel="place of the gold passage", ylabel="exact match, %", ylim=(0, 100))
    axes.set_xticks(sorted({score.place + 1 for score in placed if score.place is not None}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{report.data}: {report.questions} questions, {report.passages} passages", fontsize=10)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130)
    return target.getvalue()
