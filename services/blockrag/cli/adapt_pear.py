"""``blockrag adapt pear``: find heads that suppress copying and re-weight them, at no cost when serving."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blockrag.cli import console
from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.cli.training_workers import shown
from blockrag.errors import SetupError
from blockrag.modeling.files import DEFAULT_BUNDLE
from blockrag.training.pear.config import PUBLISHED_SIZES, PearConfig

if TYPE_CHECKING:
    from blockrag.modeling.bundle import Bundle
    from blockrag.training.adaptation.metrics import OnProgress
    from blockrag.training.adaptation.run import RunFolder
    from blockrag.training.pear.adaptation import PearReport
    from blockrag.training.pear.cost import FoldingCost

_SIZES = ",".join(f"{samples}x{tokens}" for samples, tokens in PUBLISHED_SIZES)


def register(app: typer.Typer) -> None:
    """Add the command to the group ``adapt``."""
    command = command_of(PearConfig, spellings={"heads": ("--heads", "-k")})
    app.command(epilog="Example: blockrag adapt pear --bundle my-bundle --out my-bundle-pear")(command(pear))


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
    from blockrag.training.adaptation.run import RunFolder
    from blockrag.training.adaptation.workers import OneWorker

    if (out is not None) + in_place + detect_only != 1:
        raise SetupError("give exactly one of --out, --in-place and --detect-only")
    if out is not None and out.exists():
        raise SetupError(f"{out}: exists already")
    source = load_bundle(bundle, compute_dtype=dtype)
    config = replace(config, sizes=_parse_sizes(sizes))
    beside = _beside(out or source.path)
    run_dir = (out or beside).with_name(f"{(out or beside).name}.run")
    run = None if detect_only else RunFolder(run_dir, OneWorker(device))
    with shown(as_json, lines=False) as show:
        found, cost = _adapt(source, config, device, run, show)
    made = write_pear(source, found.record, out) if found.record else None
    if run is not None and out is not None and made is not None:
        run.drop_checkpoints()
    elif run is not None:
        shutil.rmtree(run_dir)  # nothing stands beside it that says which run it was
    _tell(source, made, found, config, cost, report or beside, as_json)


def _adapt(
    source: Bundle, config: PearConfig, device: str, run: RunFolder | None, show: OnProgress
) -> tuple[PearReport, FoldingCost | None]:
    """Detect, and with ``run`` learn; a run that was stopped there goes on."""
    from blockrag.modeling.model import load_stock_model
    from blockrag.training.adaptation.metrics import StepMetrics
    from blockrag.training.pear.adaptation import adapt
    from blockrag.training.pear.cost import folding_cost
    from blockrag.training.pear.task import ordinary_tokens

    # coefficients that the bundle already has are replaced: they are relative to the weights as they are
    source = replace(source, pear=None)
    show(StepMetrics(step=0, fraction=0.0, stage="load"))
    identity = {"kind": "pear", "base": source.fingerprint, "recipe": asdict(config)}
    with run.opened(identity) if run is not None else nullcontext():
        model = load_stock_model(source, device=device)
        tokenizer = source.load_tokenizer()
        candidates = ordinary_tokens(min(source.vocab_size, len(tokenizer)), tuple(tokenizer.added_tokens_decoder))
        found = adapt(model, candidates, config, run, learning=run is not None, on_progress=show)
    if found.record is None:
        return found, None
    del model  # it is folded now
    show(StepMetrics(step=0, fraction=0.0, stage="measure"))
    return found, folding_cost(load_stock_model(source, device=device), found.record.heads)


def _tell(
    source: Bundle,
    made: Bundle | None,
    found: PearReport,
    config: PearConfig,
    cost: FoldingCost | None,
    folder: Path,
    as_json: bool,
) -> None:
    from blockrag.cli.pear_report import as_dict, print_tables, write_files
    from blockrag.training.pear.adaptation import suppressing

    content = {
        "bundle": str(source.path),
        "fingerprint": source.fingerprint,
        "made": str(made.path) if made else None,
        "made_fingerprint": made.fingerprint if made else None,
        **as_dict(found, config, cost),
    }
    data, picture = write_files(folder, found, content)
    if as_json:
        console.print_json(content)
        return
    print_tables(found, config, cost)
    if made is not None:
        console.out.print(
            f"bundle: {made.path} ({made.fingerprint[:12]}, before {source.fingerprint[:12]})", soft_wrap=True
        )
    elif suppressing(found.detections[config.mask]):
        console.out.print("detected only: no bundle was written")
    else:
        nothing = "no head suppresses copying (no Δπ above 0): nothing to re-weight, no bundle was written"
        console.out.print(nothing, soft_wrap=True)
    console.out.print(f"table: {data}\nheat map: {picture}", soft_wrap=True)


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = [tuple(int(number) for number in size.split("x")) for size in text.split(",")]
        pairs = tuple((samples, length) for samples, length in sizes)
    except ValueError as error:
        raise SetupError(f"sizes {text!r}: must be like 20x50,40x25") from error
    if any(samples < 1 for samples, _ in pairs):
        raise SetupError(f"sizes {text!r}: at least one prompt each")
    return pairs


def _beside(path: Path) -> Path:
    return path.parent / f"{path.name}-pear"
