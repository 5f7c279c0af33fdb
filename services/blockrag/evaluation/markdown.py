"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from blockrag.evaluation.intervals import Interval


def percent(value: Interval, *, sign: bool = False) -> str:
    """A share with its interval in percent: ``55.0 (45.0 to 65.0)``; ``sign`` for differences."""
    form = "{:+.1f}" if sign else "{:.1f}"
    mean, low, high = (form.format(100 * number) for number in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table under a heading; none without rows."""
    return [f"## {title}", "", *table(header, rows)] if rows else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one after it."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]
