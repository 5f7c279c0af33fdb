"""``blockrag adapt refrag``: teach a bundle to read compressed passages, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from blockrag.cli import console
from blockrag.cli.console import JsonOption
from blockrag.cli.training_workers import check_workers, training_workers

if TYPE_CHECKING:
    from blockrag.training.refrag.config import RefragConfig
    from blockrag.training.refrag.metrics import RefragMetrics
    from blockrag.training.refrag.policy_config import PolicyTrainingConfig
    from blockrag.training.refrag.policy_metrics import PolicyMetrics


def register(app: typer.Typer) -> None:
    """Add the command to the group ``adapt``."""
    example = (
        "Example: blockrag adapt refrag --stage tune --bundle my-bundle-mixed --data qa.jsonl --out my-bundle-refrag"
    )
    app.command(epilog=example)(refrag)


def refrag(
    out: Annotated[Path, typer.Option(help="Bundle to make; the run itself lives in OUT.run beside it.")],
    stage: Annotated[
        Literal["reconstruction", "pretrain", "mixed", "tune", "policy"],
        typer.Option(help="Each takes the bundle of the one before; a stage left out is an ablation."),
    ],
    bundle: Annotated[Path | None, typer.Option(help="Bundle; default: the one that ships with blockrag.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="JSONL(.gz) of long texts, or a directory; may be repeated.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="JSONL(.gz) of question rows, as adapt block reads them.")
    ] = None,
    name: Annotated[str, typer.Option(help="The bundle's name; default: as before.")] = "",
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", "-k", help="Tokens of a chunk; default: the bundle's.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="New chunk encoder: 'small', 'decoder:N' (its own first N layers), or a directory.")
    ] = "",
    pooling: Annotated[
        Literal["mean", "cls", "concat"] | None, typer.Option(help="Of a new chunk encoder's states; default: mean.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time budget of the stage's steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in steps, instead of minutes.")] = None,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step, over all workers.")] = 5000,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak, of encoder and projector (2e-3), or of a policy (1e-3).")
    ] = None,
    decoder_learning_rate: Annotated[float, typer.Option(help="Peak, of the decoder; 2e-5 at 8B parameters.")] = 4e-4,
    optimizer: Annotated[
        Literal["muon", "adamw"], typer.Option(help="muon learns faster in small models; several workers: adamw.")
    ] = "muon",
    curriculum: Annotated[
        bool, typer.Option(help="Reconstruction from one chunk to many; --no-curriculum is an ablation.")
    ] = True,
    train_decoder: Annotated[
        bool | None,
        typer.Option(
            "--train-decoder/--freeze-decoder",
            help="Whether the decoder learns too; default: in all stages but reconstruction.",
        ),
    ] = None,
    max_passages: Annotated[int, typer.Option(help="Most passages of a context.")] = 10,
    text_share: Annotated[
        float | None,
        typer.Option(help="Share of texts: of a tuning's tokens (0.2), of a policy's contexts (query 0.2, blind 0.6)."),
    ] = None,
    targets: Annotated[int, typer.Option(help="Most passages of a text's context that are targets too.")] = 4,
    compressed_share: Annotated[
        float, typer.Option(help="Mixed, tune: compositions of a text with everything compressed.")
    ] = 0.3,
    distillation: Annotated[
        float, typer.Option(help="Share of learning from the uncompressed prompt in the loss of texts.")
    ] = 0.0,
    expanded_share: Annotated[float, typer.Option(help="Mixed, tune: compositions with nothing compressed.")] = 0.2,
    full_share: Annotated[float, typer.Option(help="Mixed, tune: samples under the full mask.")] = 0.12,
    average_with: Annotated[
        Path | None, typer.Option(help="Bundle whose decoder the learnt one is averaged with at the end.")
    ] = None,
    learnt_share: Annotated[float, typer.Option(help="Weight of the learnt decoder in that average.")] = 0.5,
    policy: Annotated[
        Literal["query", "blind"], typer.Option(help="Policy: one that sees the question, or the paper's.")
    ] = "query",
    policy_width: Annotated[int, typer.Option(help="Policy: its width, a multiple of 32.")] = 64,
    draws: Annotated[int, typer.Option(min=2, help="Policy: choices drawn and read for each target of a step.")] = 8,
    text_reward: Annotated[
        Literal["label", "divergence"],
        typer.Option(help="Policy, texts: the target's likelihood, or nearness to the uncompressed predictions."),
    ] = "label",
    start_from: Annotated[
        Path | None, typer.Option(help="Policy: file of one to start from, policy-NAME.safetensors of a bundle.")
    ] = None,
    imitation: Annotated[
        float | None,
        typer.Option(help="Policy: share of the budget spent on imitating a choice that knows the target."),
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the forward pass.")] = "bf16",
    parts: Annotated[
        int, typer.Option(help="Parts of a step: for workers, or for threads of one core each; more take less memory.")
    ] = 2,
    dev_samples: Annotated[int, typer.Option(help="Held-out samples to measure on; 0: none.")] = 64,
    eval_steps: Annotated[int, typer.Option(help="Steps between two measurements.")] = 200,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of samples and new weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Workers of Ray Train, one GPU or CPU each; 1: this process.")] = 1,
    ray_address: Annotated[
        str, typer.Option(help="Ray cluster for the workers; default: one of this command's own.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Train the parts that compress passages and choose what to expand (REFRAG).

    Order: reconstruction, pretrain, mixed, tune; then a policy for the finished parts. Run the same command again to
    go on after a stop.
    """
    from transformers.utils import logging

    from blockrag.modeling.bundle import DEFAULT_BUNDLE

    with console.errors_to_exit():
        logging.disable_progress_bar()  # ours shows what matters
        # absolute, because workers have directories of their own
        source, target = (path.expanduser().absolute() for path in (bundle or DEFAULT_BUNDLE, out))
        texts, rows = (tuple(path.expanduser().absolute() for path in paths or ()) for paths in (text, data))
        if encoder not in ("", "small") and not encoder.startswith("decoder:"):
            encoder = str(Path(encoder).expanduser().absolute())
        if stage == "policy":
            from blockrag.training.refrag.policy import PpoSettings
            from blockrag.training.refrag.policy_config import PolicyTrainingConfig

            chosen = PolicyTrainingConfig(
                bundle=source,
                out=target,
                query=policy == "query",
                text=texts,
                data=rows,
                minutes=minutes,
                steps=steps,
                max_passages=max_passages,
                text_share=text_share,
                start_from=start_from.expanduser().absolute() if start_from else None,
                imitation=imitation,
                text_reward=text_reward,
                width=policy_width,
                ppo=PpoSettings(draws=draws),
                learning_rate=learning_rate or 1e-3,
                dev_contexts=dev_samples,
                eval_steps=eval_steps,
                checkpoint_steps=checkpoint_steps,
                threads=parts,
                seed=seed,
                device=device,
            )
            with _policy_shown(as_json) as show_policy:
                made, run_dir = _run_policy(chosen, workers, ray_address, show_policy), chosen.run_dir
        else:
            from blockrag.training.refrag.config import RefragConfig

            config = RefragConfig(
                bundle=source,
                out=target,
                stage=stage,
                text=texts,
                data=rows,
                name=name,
                chunk_tokens=chunk_tokens,
                encoder=encoder,
                pooling=pooling,
                minutes=minutes,
                steps=steps,
                tokens_per_step=tokens_per_step,
                learning_rate=learning_rate or 2e-3,
                decoder_learning_rate=decoder_learning_rate,
                optimizer=optimizer,
                curriculum=curriculum,
                train_decoder=train_decoder,
                max_passages=max_passages,
                text_share=0.2 if text_share is None else text_share,
                targets=targets,
                compressed_share=compressed_share,
                distillation=distillation,
                expanded_share=expanded_share,
                full_share=full_share,
                average_with=average_with.expanduser().absolute() if average_with else None,
                learnt_share=learnt_share,
                precision=precision,
                parts=parts,
                dev_samples=dev_samples,
                eval_steps=eval_steps,
                checkpoint_steps=checkpoint_steps,
                seed=seed,
                device=device,
            )
            with _shown(as_json) as show:
                made, run_dir = _run(config, workers, ray_address, show), config.run_dir
        if as_json:
            console.print_json_line({"bundle": made, "run": run_dir})
        else:
            console.out.print(f"bundle: {made}\nmetrics: {run_dir}\ncheck it: blockrag bundle verify {made}")


def _run(config: RefragConfig, workers: int, ray_address: str, show: Callable[[RefragMetrics], None]) -> Path:
    from blockrag.training.refrag.adapt import adapt_refrag, prepare

    check_workers(workers)
    prepare(config, workers)  # what is wrong is said before Ray starts
    if workers == 1 and not ray_address:
        return adapt_refrag(config, on_progress=show)
    with training_workers(ray_address, workers, on_gpus=config.device.startswith("cuda")):
        from blockrag.distributed_training.refrag import adapt_refrag_distributed

        return adapt_refrag_distributed(config, workers, show)


def _run_policy(
    config: PolicyTrainingConfig, workers: int, ray_address: str, show: Callable[[PolicyMetrics], None]
) -> Path:
    from blockrag.training.refrag.policy_stage import prepare_policy, train_policy

    check_workers(workers)
    prepare_policy(config)
    if workers == 1 and not ray_address:
        return train_policy(config, show)
    with training_workers(ray_address, workers, on_gpus=config.device.startswith("cuda")):
        from blockrag.distributed_training.refrag import train_policy_distributed

        return train_policy_distributed(config, workers, show)


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[RefragMetrics], None]]:
    """Shows a stage's progress: a bar with speed and time left, or a JSON line per step."""
    with _bar(as_json) as bar:
        task = bar.add_task("loading", total=1.0)

        def show(metrics: RefragMetrics) -> None:
            if as_json:
                console.print_json_line(metrics)
                return
            losses = [f"{kind} {loss:.3f}" for kind, loss in metrics.losses.items()]
            left = f"{int(metrics.eta_seconds // 60)}:{int(metrics.eta_seconds % 60):02d} left"
            speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
            description = "  ".join([f"step {metrics.step}", *losses, speed, left])
            bar.update(task, completed=metrics.fraction, description=description)
            for label, values in metrics.dev.items():
                found = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
                bar.console.print(f"step {metrics.step}, held out, {label}: {found}", markup=False, soft_wrap=True)

        yield show


@contextmanager
def _policy_shown(as_json: bool) -> Iterator[Callable[[PolicyMetrics], None]]:
    """The same for a policy."""
    with _bar(as_json) as bar:
        task = bar.add_task("loading", total=1.0)

        def show(metrics: PolicyMetrics) -> None:
            if as_json:
                console.print_json_line(metrics.to_dict())
                return
            reward = f"  reward {metrics.update.reward:.3f}" if metrics.update else ""
            bar.update(task, completed=metrics.fraction, description=f"step {metrics.step}{reward}")
            for score in metrics.dev.scores if metrics.dev else ():
                bar.console.print(
                    f"step {metrics.step}, held out, {score.kind} at rate {score.rate:g}: {score.policy:.3f} nats, "
                    f"random {score.random:.3f}, gain {score.gain:.3f} ± {score.error:.3f}",
                    markup=False,
                    soft_wrap=True,
                )

        yield show


def _bar(hidden: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console.err, disable=hidden)
