"""``blockrag adapt``: make a checkpoint serve cached blocks well, and read compressed passages."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import typer

from blockrag.cli import adapt_pear
from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.cli.training_workers import RayOption, WorkersOption, run_training
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.refrag.stage_config import STAGES, PolicyTrainingConfig, RefragConfig, Stage

app = typer.Typer(no_args_is_help=True, help="Adapt checkpoints and bundles.")


def block(
    config: BlockAdaptConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Fine-tune under the block mask and the full mask, so that cached passages answer as well as a whole prompt.

    Run the same command again to go on after a stop.
    """
    from blockrag.training.adaptation.block import adapt_block, prepare

    run_training(with_shares(config), prepare, adapt_block, workers, ray_address, as_json)


def with_shares(config: BlockAdaptConfig) -> BlockAdaptConfig:
    """FILE or FILE=SHARE each; no shares where none is named, and 1 for files without one where another has one."""
    files: list[Path] = []
    shares: list[float | None] = []
    for path in config.data:
        name, separator, share = path.name.rpartition("=")
        try:
            value = float(share) if separator else None
        except ValueError:
            value = None  # a file whose name holds the sign
        files.append(path if value is None else path.with_name(name))
        shares.append(value)
    named = any(share is not None for share in shares)
    given = tuple(1.0 if share is None else share for share in shares) if named else ()
    return replace(config, data=tuple(files), shares=given)


_SPELLINGS = {
    "chunk_tokens": ("--chunk-tokens", "-k"),
    "train_decoder": ("--train-decoder/--freeze-decoder",),
}
_LEARNS: dict[Stage, str] = {
    "reconstruction": "Learn to say again what chunks say, from one chunk to many, with the decoder frozen.",
    "pretrain": "Learn to go on after compressed passages of a text.",
    "mixed": "The same with some of the chunks expanded.",
    "tune": "Learn to answer questions over passages of which some chunks are compressed.",
}


def _stage(
    config: RefragConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    from blockrag.training.refrag.stages import adapt_refrag, prepare

    if config.alignment == "text":
        config = replace(config, encoder=str(Path(config.encoder).expanduser().absolute()))
    run_training(config, prepare, adapt_refrag, workers, ray_address, as_json)


def policy(
    config: PolicyTrainingConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Train what chooses the chunks to expand, with everything else frozen."""
    from blockrag.training.refrag.policy_stage import prepare_policy, train_policy

    run_training(config, prepare_policy, train_policy, workers, ray_address, as_json)


app.command(epilog="Example: blockrag adapt block --model ~/models/Llama-3.2-1B --data qa.jsonl --out my-bundle")(
    command_of(BlockAdaptConfig, left_out={"shares"}, spellings={"template_file": ("--template",)})(block)
)
adapt_pear.register(app)
refrag = typer.Typer(
    no_args_is_help=True,
    help="Train the parts that compress passages and choose what to expand (REFRAG), stage by stage.",
    epilog="Each stage takes the bundle of the one before, in this order; one left out is an ablation. The same "
    "command again goes on after a stop.",
)
for stage, text in _LEARNS.items():
    others = {item.name for item in fields(RefragConfig) if stage not in item.metadata.get("stages", STAGES)}
    data = " --data qa.jsonl" if stage == "tune" else " --text texts.jsonl"
    command = command_of(RefragConfig, left_out=others, spellings=_SPELLINGS, given={"stage": stage})
    refrag.command(
        stage,
        help=text,
        epilog=f"Example: blockrag adapt refrag {stage} --bundle my-bundle{data} --steps 1000 --out my-bundle-2",
    )(command(_stage))
refrag.command(
    "policy", epilog="Example: blockrag adapt refrag policy --bundle tuned --data qa.jsonl --steps 500 --out mine"
)(command_of(PolicyTrainingConfig)(policy))
app.add_typer(refrag, name="refrag")
