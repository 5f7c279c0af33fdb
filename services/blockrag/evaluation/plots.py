"""Plots of evaluations, as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from blockrag.errors import SetupError
from blockrag.evaluation.compression_scores import COMPRESSED, UNCOMPRESSED, CompressionReport
from blockrag.evaluation.peers.rounds import STATES, PeerRow
from blockrag.evaluation.qa_scores import QaReport
from blockrag.evaluation.ttft_grpc import LABELS, ReportRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PEER_STATES = dict(zip(STATES, ("o-", "s-", "^-", "v--", "x:", "D-", "o:"), strict=True))
"""Marker and line of each state; a peer is a colour."""


def load_figure() -> type[Figure]:
    """matplotlib's figure. Raises ``SetupError`` where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("plots need matplotlib: pip install 'blockrag[adapt]'") from error
    return Figure


def plot_places(report: QaReport) -> bytes:
    """Exact match over the place of the gold passage: every system and mode with its 95 % intervals."""
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
    axes.legend(fontsize=8)
    axes.set_title(f"{report.data}: {report.questions} questions, {report.passages} passages", fontsize=10)
    return _png(figure)


def plot_compression(report: CompressionReport) -> bytes:
    """Quality against slots, a panel for questions and one for paragraphs: a curve per selector, 95 % intervals."""
    results = report.results
    panels: list[tuple[str, str, list[tuple[str, float, tuple[float, float, float]]]]] = []
    if results.scores:
        points = [
            (one.selector, one.slots, _bounds(one.exact_match, 100.0)) for one in results.scores if not one.reencoded
        ]
        panels.append((f"{report.data}: {results.questions} questions", "exact match, %", points))
    if results.text:
        points = [(one.selector, one.slots, _bounds(one.nats, 1.0)) for one in results.text if one.slots]
        panels.append((f"{report.text}: next paragraph", "nats per token (lower is better)", points))
    figure = load_figure()(figsize=(6.5 * max(1, len(panels)), 4.8), layout="constrained")
    for axes, (title, label, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, points)
        axes.set(xlabel="slots of the passages in the prompt", ylabel=label, xscale="log")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    return _png(figure, f"{report.bundle} {report.version}, chunks of {report.chunk_tokens} tokens")


def plot_rows(rows: Sequence[ReportRow], title: str) -> bytes:
    """Median time to first token over context size, one line per state, one panel per path."""
    paths = [path for path in ("model", "grpc") if any(row.path == path for row in rows)]
    figure = load_figure()(figsize=(6 * len(paths), 4.5), layout="constrained")
    for axes, path in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths, strict=True):
        for state, label in LABELS.items():
            line = sorted(
                (row for row in rows if row.path == path and row.state == state), key=lambda row: row.context_tokens
            )
            if line:
                axes.plot([row.context_tokens for row in line], [row.median_ms for row in line], "o-", label=label)
        _over_sizes(axes, [row.context_tokens for row in rows], "time to first token, ms")
        axes.set_title("model alone" if path == "model" else "over gRPC")
        axes.legend(fontsize=8)
    return _png(figure, title)


def plot_peers(rows: Sequence[PeerRow], title: str) -> bytes:
    """Time to the first token, and of each further one, over context size, one stream: a line per peer and state."""
    figure = load_figure()(figsize=(12, 4.8), layout="constrained")
    single = sorted((row for row in rows if row.state and row.streams == 1), key=lambda row: row.context_tokens)
    panels = (("first_ms", "time to first token, ms"), ("token_ms", "ms a token after it"))
    colours = {peer: f"C{number}" for number, peer in enumerate(dict.fromkeys(row.peer for row in single))}
    for axes, (field, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for peer, state in dict.fromkeys((row.peer, row.state) for row in single):
            line = [row for row in single if (row.peer, row.state) == (peer, state) and getattr(row, field) is not None]
            sizes, taken = [row.context_tokens for row in line], [getattr(row, field) for row in line]
            kind, styled = peer.partition(",")[0], _PEER_STATES[state]
            axes.plot(sizes, taken, styled, color=colours[peer], label=f"{kind}: {STATES[state]}", markersize=5)
        _over_sizes(axes, [row.context_tokens for row in single], label)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return _png(figure, title)


def _over_sizes(axes: Any, sizes: Iterable[int], label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="passage tokens", ylabel=label)
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, [f"{size}" for size in ticks])
    axes.minorticks_off()


def _draw(axes: Any, points: list[tuple[str, float, tuple[float, float, float]]]) -> None:
    # everything compressed and nothing compressed are the two ends of every selector's curve
    ends = [point for point in points if point[0] in (UNCOMPRESSED, COMPRESSED)]
    for name in dict.fromkeys(point[0] for point in points):
        own = [point for point in points if point[0] == name]
        shared = name in (UNCOMPRESSED, COMPRESSED, "full attention")
        line = sorted(own if shared else [*own, *ends], key=lambda point: point[1])
        slots = [point[1] for point in line]
        means, lows, highs = zip(*(point[2] for point in line), strict=True)
        axes.plot(slots, means, "s" if shared else "o-", label=name)
        if not shared:
            axes.fill_between(slots, lows, highs, alpha=0.1)


def _bounds(value: Any, scale: float) -> tuple[float, float, float]:
    return scale * value.mean, scale * value.low, scale * value.high


def _png(figure: Figure, title: str = "") -> bytes:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return as_png(figure, title)


def as_png(figure: Figure, title: str) -> bytes:
    """The figure's file, under a title."""
    if title:
        figure.suptitle(title, fontsize=10)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130)
    return target.getvalue()
