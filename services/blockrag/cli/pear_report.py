"""What ``blockrag adapt pear`` shows: tables for people, one JSON object, a heat map of Δπ."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from blockrag.cli import console
from blockrag.errors import SetupError

if TYPE_CHECKING:
    from blockrag.training.pear.adaptation import PearReport
    from blockrag.training.pear.config import PearConfig
    from blockrag.training.pear.cost import FoldingCost

_SHOWN_HEADS = 12


def as_dict(report: PearReport, config: PearConfig, cost: FoldingCost | None) -> dict[str, Any]:
    """Everything that was measured, as JSON has it."""
    return {
        "settings": asdict(config),
        "detections": {
            condition: {
                "delta_pi": detection.delta_pi.tolist(),
                "ranked": [
                    {"layer": layer, "head": head, "delta_pi": value} for layer, head, value in detection.ranked()
                ],
                "pi": list(detection.pi),
                "accuracy": detection.accuracy,
            }
            for condition, detection in report.detections.items()
        },
        "rank_correlations": dict(report.correlations),
        "proxy_before": {mask: asdict(score) for mask, score in report.before.items()},
        "pear": report.record.to_dict() if report.record else None,
        "cost": asdict(cost) if cost else None,
        "seconds": dict(report.seconds),
    }


def write_files(folder: Path, report: PearReport, content: dict[str, Any]) -> tuple[Path, Path]:
    """``pear.json`` and ``delta_pi.png`` in ``folder``, which is made. Raises SetupError without matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / "pear.json", folder / "delta_pi.png"
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw_heat_map(report, picture)
    return data, picture


def draw_heat_map(report: PearReport, file: Path) -> None:
    """Layer × head for both masks, one scale; re-weighted heads are marked. Raises SetupError without matplotlib.

    The scale is logarithmic outside its middle hundredth: heads that copy have changes a hundred times those that
    suppress.
    """
    try:
        from matplotlib.colors import SymLogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("the heat map needs matplotlib: pip install 'blockrag[adapt]'") from error
    maps = {condition: report.detections[condition].delta_pi for condition in ("full", "block")}
    layers, heads = maps["full"].shape
    limit = max(1e-9, *(float(values.abs().max()) for values in maps.values()))
    figure = Figure(figsize=(2 * min(8, 2.5 + 0.3 * heads), min(10, 1.8 + 0.3 * layers)), layout="constrained")
    scale = SymLogNorm(linthresh=limit / 100, vmin=-limit, vmax=limit)
    images = []
    for axes, (condition, values) in zip(figure.subplots(1, 2), maps.items(), strict=True):
        images.append(axes.imshow(values.numpy(), cmap="RdBu_r", norm=scale, aspect="auto"))
        axes.set(title=f"{condition} mask", xlabel="head", ylabel="layer")
        axes.set_xticks(range(0, heads, max(1, heads // 8)))
        axes.set_yticks(range(0, layers, max(1, layers // 8)))
        if report.record is not None:
            chosen = report.record.heads
            axes.scatter([item.head for item in chosen], [item.layer for item in chosen], c="black", marker=".", s=16)
    figure.colorbar(images[0], ax=figure.axes, label="Δπ (red: suppresses copying)")
    figure.suptitle(f"rank correlation {report.correlations['full / block']:.2f}", fontsize=10)
    figure.savefig(file, dpi=130)


def print_tables(report: PearReport, config: PearConfig, cost: FoldingCost | None) -> None:
    """The heads with the largest Δπ, what was learned, and what it costs."""
    taus = {(item.layer, item.head): item.tau for item in report.record.heads} if report.record else {}
    table = Table("layer", "head", *report.detections, "τ", title=f"Δπ, by the {config.mask} mask")
    for layer, head, _ in report.detections[config.mask].ranked()[: max(_SHOWN_HEADS, len(taus))]:
        changes = [f"{float(found.delta_pi[layer, head]):+.1%}" for found in report.detections.values()]
        tau = taus.get((layer, head))
        table.add_row(str(layer), str(head), *changes, "" if tau is None else f"{tau:.3f}")
    console.out.print(table)
    copied = ", ".join(f"{condition} {found.accuracy:.0%}" for condition, found in report.detections.items())
    console.out.print(f"prompts whose last token is copied: {copied}", soft_wrap=True)
    for pair, value in report.correlations.items():
        console.out.print(f"rank correlation of Δπ, {pair}: {value:.3f}", highlight=False, soft_wrap=True)
    scores = Table("mask", "loss before", "loss after", "copied before", "copied after", title="proxy task, held out")
    for mask, before in report.before.items():
        after = report.record.after[mask] if report.record else None
        scores.add_row(
            mask,
            f"{before.loss:.4f}",
            f"{after.loss:.4f}" if after else "",
            f"{before.accuracy:.1%}",
            f"{after.accuracy:.1%}" if after else "",
        )
    console.out.print(scores)
    if cost is not None:
        console.out.print(
            f"folded: {cost.parameters[1] - cost.parameters[0]} parameters and "
            f"{cost.operations[1] - cost.operations[0]} operations more; a pass over {cost.tokens} tokens takes "
            f"{cost.time_ratio:.3f} of the {cost.milliseconds:.1f} ms without",
            highlight=False,
            soft_wrap=True,
        )
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    console.out.print(f"time: {spent}", highlight=False, soft_wrap=True)
