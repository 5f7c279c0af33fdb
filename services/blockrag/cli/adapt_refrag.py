"""``blockrag adapt refrag``: teach a bundle to read compressed passages, stage by stage."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import typer

from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.cli.training_workers import RayOption, WorkersOption, run_training
from blockrag.training.refrag.config import STAGES, RefragConfig, Stage
from blockrag.training.refrag.policy_config import PolicyTrainingConfig

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


def register(app: typer.Typer) -> None:
    """Add the group to the group ``adapt``."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Train the parts that compress passages and choose what to expand (REFRAG), stage by stage.",
        epilog="Each stage takes the bundle of the one before, in this order; one left out is an ablation. The same "
        "command again goes on after a stop.",
    )
    for stage, text in _LEARNS.items():
        others = {item.name for item in fields(RefragConfig) if stage not in item.metadata.get("stages", STAGES)}
        data = " --data qa.jsonl" if stage == "tune" else " --text texts.jsonl"
        command = command_of(RefragConfig, left_out=others, spellings=_SPELLINGS, given={"stage": stage})
        group.command(
            stage,
            help=text,
            epilog=f"Example: blockrag adapt refrag {stage} --bundle my-bundle{data} --steps 1000 --out my-bundle-2",
        )(command(_stage))
    group.command(
        "policy", epilog="Example: blockrag adapt refrag policy --bundle tuned --data qa.jsonl --steps 500 --out mine"
    )(command_of(PolicyTrainingConfig)(policy))
    app.add_typer(group, name="refrag")


def _stage(
    config: RefragConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    from blockrag.training.refrag.adapt import adapt_refrag, prepare

    if config.alignment == "text":
        config = replace(config, encoder=str(Path(config.encoder).expanduser().absolute()))
    run_training(config, prepare, adapt_refrag, workers, ray_address, as_json)


def policy(
    config: PolicyTrainingConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Train what chooses the chunks to expand, with everything else frozen."""
    from blockrag.training.refrag.policy_stage import prepare_policy, train_policy

    run_training(config, prepare_policy, train_policy, workers, ray_address, as_json)
