"""Training the reader from scratch: ``train_reader`` and a small command line for machines that have only torch.

The recipe: contexts of a few titled passages with several questions each (``packing``), the block mask and the full
mask in turn, so that one set of weights serves both modes (arXiv 2409.15355, section 2.3), loss on answers plus a
smaller loss on passages and questions, and a learning rate that falls with a cosine over a number of steps or over a
time budget. A run may start from a bundle's weights.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.training.allocator import keep_freed_memory
from blockrag.training.attention import register as register_attention
from blockrag.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from blockrag.training.config import SHAPES, STRETCHED_ROPE, ReaderTrainingConfig
from blockrag.training.contexts import Context
from blockrag.training.data import ReaderData, load_reader_data
from blockrag.training.export import BundleFacts, export_bundle
from blockrag.training.feeding import BatchFeed, BatchMaker, BatchRecipe
from blockrag.training.optimizer import build_optimizers, learning_rate_factor
from blockrag.training.packing import pack
from blockrag.training.step import Part, hidden_states, update
from blockrag.training.tokenizer import save_tokenizer, tokenizer_texts, train_tokenizer


@dataclass(frozen=True)
class TrainingProgress:
    """State of a run after a step."""

    step: int
    fraction: float
    """Part of the budget that is used up, 0 to 1."""
    answer_loss: float
    """Nats per answer token, this step."""
    passage_loss: float
    """Nats per passage or question token, this step."""
    learning_rate: float
    tokens: int
    """Tokens trained on since the start, without padding."""
    seconds: float
    """Time spent in steps since the start."""
    probe_exact: dict[str, float] | None = None
    """Share of held-out questions whose greedy answer is exactly right (block mask), by source, where measured."""


def train_reader(config: ReaderTrainingConfig, on_progress: Callable[[TrainingProgress], None] | None = None) -> Path:
    """Train until the budget is used up, or continue a run that was stopped; returns the bundle's directory.

    Raises ``FileNotFoundError`` where a data file is absent and ``ValueError`` for a contradictory configuration.
    """
    if (config.minutes is None) == (config.steps is None):
        raise ValueError("exactly one of minutes and steps must be given")
    config.out_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    data = load_reader_data(config.data_dir)
    recipe = _recipe(config, _tokenizer(config, data))
    maker = BatchMaker(recipe, data)
    probes = maker.probes(config.probe_contexts)
    torch.manual_seed(config.seed)
    model = _model(config)
    model.set_attn_implementation(register_attention())
    optimizers = build_optimizers(model, config.optimizer, config.learning_rate)
    state = load_checkpoint(config.out_dir, model, optimizers) or Checkpoint()
    with (
        BatchFeed(maker, recipe, config.feeders) as feed,
        ThreadPoolExecutor(config.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        state = _run(config, model, optimizers, state, feed, pool, probes, on_progress)
    facts = BundleFacts(
        template=config.template,
        training={"steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds)},
    )
    return export_bundle(model, config.out_dir / "tokenizer", config.out_dir / "bundle", facts)


def _run(
    config: ReaderTrainingConfig,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    state: Checkpoint,
    feed: BatchFeed,
    pool: ThreadPoolExecutor,
    probes: dict[str, list[Context]],
    on_progress: Callable[[TrainingProgress], None] | None,
) -> Checkpoint:
    """The steps from ``state`` to the end of the budget; gives the state there."""
    fraction = _fraction(config, state)
    while fraction < 1:
        started = time.perf_counter()
        factor = learning_rate_factor(state.step, fraction, config.warmup_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
        batches = feed.take(state.step, partial(_fraction_at, config, fraction))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
        parts = [Part.choose(batch, config.passage_share, generator) for batch in batches]
        losses = update(model, optimizers, parts, pool, config.device, config.evidence)
        state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + sum(batch.tokens for batch in batches),
            seconds=state.seconds + time.perf_counter() - started,
        )
        fraction = _fraction(config, state)
        exact = None
        if state.step % config.checkpoint_steps == 0 or fraction >= 1:
            save_checkpoint(config.out_dir, model, optimizers, state)
            exact = {name: probe_exact(model, contexts, config) for name, contexts in probes.items() if contexts}
        if on_progress is not None:
            on_progress(
                TrainingProgress(
                    step=state.step,
                    fraction=min(1.0, fraction),
                    answer_loss=losses[0],
                    passage_loss=losses[1],
                    learning_rate=config.learning_rate * factor,
                    tokens=state.tokens,
                    seconds=state.seconds,
                    probe_exact=exact,
                )
            )
    return state


@torch.no_grad()
def probe_exact(model: LlamaForCausalLM, contexts: list[Context], config: ReaderTrainingConfig) -> float:
    """Share of questions answered exactly under the block mask.

    Greedy decoding gives the target exactly when every target token is the most likely one after the tokens before
    it, so one pass over the targets measures what decoding would.
    """
    right = asked = 0
    for start in range(0, len(contexts), 16):
        batch = pack(contexts[start : start + 16], block=True, weights=config.weights)
        places = batch.branches.to(config.device) >= 0
        with torch.autocast(config.device, dtype=torch.bfloat16):
            logits = model.lm_head(hidden_states(model, batch, config.device)[places])
        correct = (logits.argmax(-1) == batch.targets.to(config.device)[places]).float()
        branches = batch.branches.to(config.device)[places]
        count = int(branches.max()) + 1
        wrong = torch.zeros(count, device=config.device).index_add_(0, branches, 1 - correct)
        right, asked = right + int((wrong == 0).sum()), asked + count
    return right / asked


def _recipe(config: ReaderTrainingConfig, tokenizer_dir: Path) -> BatchRecipe:
    return BatchRecipe(
        data_dir=config.data_dir,
        tokenizer_dir=tokenizer_dir,
        template=config.template,
        mixture=config.mixture,
        weights=config.weights,
        tokens_per_step=config.tokens_per_step,
        parts=config.parts,
        block_masks=config.masks == "both",
        always_long=config.start_from is not None,
        multiple=16 if config.device.startswith("cuda") else 1,
        seed=config.seed,
        related_words=config.related_words,
    )


def _fraction(config: ReaderTrainingConfig, state: Checkpoint) -> float:
    if config.minutes is not None:
        return state.seconds / (60 * config.minutes)
    return state.step / (config.steps or 1)


def _fraction_at(config: ReaderTrainingConfig, now: float, step: int) -> float:
    """How far the training is at a step to come: by the number of steps, or as far as it is now."""
    return now if config.steps is None else step / config.steps


def _model(config: ReaderTrainingConfig) -> LlamaForCausalLM:
    if config.start_from is None:
        return LlamaForCausalLM(config.shape.config()).to(config.device)
    model = load_stock_model(load_bundle(config.start_from), device=config.device)
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"{config.start_from}: {type(model).__name__}; readers are Llamas, see adapt block for others")
    if config.stretch_rope:
        model.config.rope_parameters = dict(STRETCHED_ROPE)
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(config.device)
    return model


def _tokenizer(config: ReaderTrainingConfig, data: ReaderData) -> Path:
    """The directory of the run's tokenizer, which is learnt or copied there where it is not there yet."""
    folder = config.out_dir / "tokenizer"
    if config.start_from is not None:
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(config.start_from / "decoder" / name, folder / name)
    elif not (folder / "tokenizer_config.json").exists():
        learnt = train_tokenizer(tokenizer_texts(data, config.tokenizer_articles), config.shape.vocab_size)
        save_tokenizer(learnt, folder, config.shape.max_tokens)
    return folder


def main() -> None:
    """``python -m blockrag.training.reader``: the same training without the command line's dependencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with train/ and dev/")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoint and bundle")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="time budget of the training")
    budget.add_argument("--steps", type=int, help="budget in steps")
    parser.add_argument("--start-from", type=Path, help="bundle whose weights and tokenizer the run starts from")
    parser.add_argument("--stretch-rope", action="store_true", help="give that bundle a new reader's rotations")
    parser.add_argument("--related-words", type=Path, help="directory of a sentence encoder")
    parser.add_argument("--masks", choices=("both", "full"), default=ReaderTrainingConfig.masks)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=ReaderTrainingConfig.optimizer)
    parser.add_argument("--learning-rate", type=float, default=ReaderTrainingConfig.learning_rate)
    parser.add_argument("--evidence", type=float, default=ReaderTrainingConfig.evidence)
    parser.add_argument("--passage-share", type=float, default=ReaderTrainingConfig.passage_share)
    parser.add_argument("--tokens-per-step", type=int, default=ReaderTrainingConfig.tokens_per_step)
    parser.add_argument("--size", choices=SHAPES, default="6m", help="of a reader trained from random weights")
    parser.add_argument("--parts", type=int, default=ReaderTrainingConfig.parts)
    parser.add_argument("--threads", type=int, default=ReaderTrainingConfig.threads)
    parser.add_argument("--feeders", type=int, default=ReaderTrainingConfig.feeders)
    parser.add_argument("--checkpoint-steps", type=int, default=ReaderTrainingConfig.checkpoint_steps)
    parser.add_argument("--device", default=ReaderTrainingConfig.device)
    parser.add_argument("--seed", type=int, default=ReaderTrainingConfig.seed)
    given = vars(parser.parse_args())
    paths = {"data_dir": given.pop("data"), "out_dir": given.pop("out")}
    config = ReaderTrainingConfig(**paths, shape=SHAPES[given.pop("size")], **given)
    print(f"bundle written to {train_reader(config, _print_progress)}")


def _print_progress(progress: TrainingProgress) -> None:
    if progress.step % 20 == 0 or progress.probe_exact is not None:
        probe = "".join(f"  {name} {exact:.3f}" for name, exact in (progress.probe_exact or {}).items())
        print(
            f"{time.strftime('%H:%M:%S')}  step {progress.step}  {100 * progress.fraction:.1f} %"
            f"  answer {progress.answer_loss:.3f}  passage {progress.passage_loss:.3f}  lr {progress.learning_rate:.2e}"
            f"  {progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s  {progress.seconds:.0f} s{probe}",
            flush=True,
        )


if __name__ == "__main__":
    main()
