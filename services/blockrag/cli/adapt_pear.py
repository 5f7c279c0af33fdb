"""``blockrag adapt pear``: find heads that suppress copying and re-weight them, at no cost when serving."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from blockrag.cli import console
from blockrag.cli.adapt import app as app
from blockrag.cli.adapt import shown
from blockrag.cli.console import JsonOption
from blockrag.cli.measured import as_bytes, write_results
from blockrag.cli.options import command_of
from blockrag.errors import SetupError
from blockrag.modeling.files import DEFAULT_BUNDLE
from blockrag.training.pear.pear_config import PUBLISHED_SIZES, PearConfig

if TYPE_CHECKING:
    from blockrag.modeling.bundle import Bundle
    from blockrag.training.pear.procedure import PearReport
    from blockrag.training.run import OnProgress, RunFolder


_SIZES = ",".join(f"{samples}x{tokens}" for samples, tokens in PUBLISHED_SIZES)


@app.command(epilog="Example: blockrag adapt pear --bundle my-bundle --out my-bundle-pear")
@command_of(PearConfig, spellings={"heads": ("--heads", "-k")})
def pear(
    config: PearConfig,
    bundle: Annotated[Path, typer.Option(help="Bundle; default: the one that ships with blockrag.")] = DEFAULT_BUNDLE,
    out: Annotated[Path | None, typer.Option(help="Bundle to make; the one given is left alone.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the bundle's manifest instead.")] = False,
    detect_only: Annotated[bool, typer.Option("--detect-only", help="Only find heads; make no bundle.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Directory of pear.json and delta_pi.png; default: OUT (or BUNDLE) + '-pear'.")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Prompts x tokens per copy, averaged over.")] = _SIZES,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type to compute in.")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Detect heads that suppress copying, learn a coefficient for each, keep them in the bundle.

    Weights stay as they are: the coefficients are folded into them whenever they are loaded. Whether answers get
    better is for `blockrag eval` to say; the proxy task's loss alone does not.
    """
    from blockrag.modeling.bundle import load_bundle
    from blockrag.modeling.bundle_writing import write_pear
    from blockrag.training.run import RunFolder
    from blockrag.training.workers import Workers

    if (out is not None) + in_place + detect_only != 1:
        raise SetupError("give exactly one of --out, --in-place and --detect-only")
    if out is not None and out.exists():
        raise SetupError(f"{out}: exists already")
    source = load_bundle(bundle, compute_dtype=dtype)
    config = replace(config, sizes=_parse_sizes(sizes))
    made_at = out or source.path
    beside = made_at.parent / f"{made_at.name}-pear"
    run_dir = (out or beside).with_name(f"{(out or beside).name}.run")
    run = None if detect_only else RunFolder(run_dir, Workers(device))
    with shown(as_json, lines=False) as show:
        found = _adapt(source, config, device, run, show)
    made = write_pear(source, found.record, out) if found.record else None
    if run is not None and out is not None and made is not None:
        run.drop_checkpoints()
    elif run is not None:
        shutil.rmtree(run_dir)  # nothing stands beside it that says which run it was
    _tell(source, made, found, config, report or beside, as_json)


def _adapt(source: Bundle, config: PearConfig, device: str, run: RunFolder | None, show: OnProgress) -> PearReport:
    """Detect, and with ``run`` learn; a run that was stopped there goes on."""
    from blockrag.modeling.model import load_stock_model
    from blockrag.training.pear.passes import ordinary_tokens
    from blockrag.training.pear.procedure import adapt
    from blockrag.training.run import StepMetrics

    # coefficients that the bundle already has are replaced: they are relative to the weights as they are
    source = replace(source, pear=None)
    show(StepMetrics(step=0, fraction=0.0, stage="load"))
    identity = {"kind": "pear", "base": source.fingerprint, "recipe": asdict(config)}
    with run.opened(identity) if run is not None else nullcontext():
        model = load_stock_model(source, device=device)
        tokenizer = source.load_tokenizer()
        candidates = ordinary_tokens(min(source.vocab_size, len(tokenizer)), tuple(tokenizer.added_tokens_decoder))
        return adapt(model, candidates, config, run, learning=run is not None, on_progress=show)


def _tell(
    source: Bundle,
    made: Bundle | None,
    found: PearReport,
    config: PearConfig,
    folder: Path,
    as_json: bool,
) -> None:
    from blockrag.training.pear.procedure import suppressing

    content = {
        "bundle": str(source.path),
        "fingerprint": source.fingerprint,
        "made": str(made.path) if made else None,
        "made_fingerprint": made.fingerprint if made else None,
        **as_dict(found, config),
    }
    write_results(folder, {"pear.json": as_bytes(content), "delta_pi.png": heat_map(found)})
    if as_json:
        console.print_json(content)
        return
    print_tables(found, config)
    if made is not None:
        console.out.print(
            f"bundle: {made.path} ({made.fingerprint[:12]}, before {source.fingerprint[:12]})", soft_wrap=True
        )
    elif suppressing(found.detections[config.mask]):
        console.out.print("detected only: no bundle was written")
    else:
        nothing = "no head suppresses copying (no Δπ above 0): nothing to re-weight, no bundle was written"
        console.out.print(nothing, soft_wrap=True)


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = [tuple(int(number) for number in size.split("x")) for size in text.split(",")]
        pairs = tuple((samples, length) for samples, length in sizes)
    except ValueError as error:
        raise SetupError(f"sizes {text!r}: must be like 20x50,40x25") from error
    if any(samples < 1 for samples, _ in pairs):
        raise SetupError(f"sizes {text!r}: at least one prompt each")
    return pairs


_SHOWN_HEADS = 12


def as_dict(report: PearReport, config: PearConfig) -> dict[str, Any]:
    """Everything that was measured, as JSON has it."""
    return {
        "settings": asdict(config),
        "detections": {
            condition: {
                **detection.to_dict(),
                "ranked": [
                    {"layer": layer, "head": head, "delta_pi": value} for layer, head, value in detection.ranked()
                ],
            }
            for condition, detection in report.detections.items()
        },
        "rank_correlations": dict(report.correlations),
        "proxy_before": {mask: asdict(score) for mask, score in report.before.items()},
        "pear": report.record.to_dict() if report.record else None,
        "seconds": dict(report.seconds),
    }


def heat_map(report: PearReport) -> bytes:
    """Layer × head for both masks, one scale; re-weighted heads are marked. A PNG; SetupError without matplotlib.

    The scale is logarithmic outside its middle hundredth: heads that copy have changes a hundred times those that
    suppress.
    """
    from blockrag.evaluation.plots import as_png, load_figure

    figure_of = load_figure()
    from matplotlib.colors import SymLogNorm

    maps = {condition: report.detections[condition].delta_pi for condition in ("full", "block")}
    layers, heads = maps["full"].shape
    limit = max(1e-9, *(float(values.abs().max()) for values in maps.values()))
    figure = figure_of(figsize=(2 * min(8, 2.5 + 0.3 * heads), min(10, 1.8 + 0.3 * layers)), layout="constrained")
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
    return as_png(figure, f"rank correlation {report.correlations['full / block']:.2f}")


def print_tables(report: PearReport, config: PearConfig) -> None:
    """The heads with the largest Δπ, and what was learned."""
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
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    console.out.print(f"time: {spent}", highlight=False, soft_wrap=True)
