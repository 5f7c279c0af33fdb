"""What decides an adaptation run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from blockrag.training.configuring import Precision, RunConfig

Masks = Literal["both", "mixed", "block", "full"]
Trainable = Literal["all", "tokens"]
AttentionKind = Literal["auto", "flex", "dense"]


@dataclass(frozen=True, kw_only=True)
class BlockAdaptConfig(RunConfig):
    """An adaptation run. Defaults of learning rate, warm-up and steps are those of arXiv 2409.15355, section 3.1."""

    model: Path
    """A Hugging Face checkpoint (safetensors, fast tokenizer), a .gguf file, package:NAME, or a bundle, whose template
    is then kept."""
    data: tuple[Path, ...]
    """JSONL(.gz) files of question rows, or directories of such; on the command line FILE=SHARE gives a file its share
    of the contexts, where ``questions`` is above 1."""
    name: str = ""
    """The bundle's name; default: that of ``out``."""
    template_file: Path | None = None
    """JSON file with the fields of PromptTemplate; None: the bundle's, or one made from the tokenizer."""
    steps: int = 1000
    """500 to 1000 suffice at 8B parameters."""
    batch_size: int = 16
    """Samples of a step, over all workers. Each is trained once under each mask."""
    micro_batch: int = 1
    """Samples of one forward pass on one worker; raise it while memory lasts."""
    learning_rate: float = 2e-5
    """Peak of AdamW's rate. Small models take more: 1e-4 at ten million parameters."""
    warmup_steps: int = 20
    """Steps until the learning rate is reached."""
    masks: Masks = "both"
    """"both": every sample under each. "mixed": two samples of three under the block mask, the third under the full
    one, so that as many tokens hold twice the questions. "block" or "full" alone make the siblings that an ablation
    compares with."""
    questions: int = 1
    """Most questions of a context. 1: every row is a sample of its own. More: one pass over the passages serves all
    questions that they answer; batches then count contexts, and ``data`` may hold pattern questions too."""
    shares: tuple[float, ...] = ()
    """With ``questions`` above 1: each file's share of the contexts, in the order of ``data``; empty: all alike."""
    exclude: tuple[Path, ...] = ()
    """Question files that are evaluated on: passages that share a run of words with theirs are left out. Only
    with ``questions`` above 1."""
    lora_rank: int = 0
    """Rank of a low-rank adapter (LoRA) beside every linear layer, which alone is trained; 0: all weights are."""
    min_passages: int = 1
    """Fewest passages of a sample."""
    max_passages: int = 20
    """Most passages of a sample."""
    passage_tokens: int | None = None
    """Most tokens of a passage's block; None: the bundle's, or 128."""
    max_tokens: int = 4096
    """Longest sample, prompt and answer; bounded by the model's positions. Distractors are left out to keep it."""
    refusal_share: float = 0.1
    """Share of samples whose gold passages are left out and whose answer is the template's refusal."""
    distillation: float = 0.0
    """Weight of the distillation from the full mask to the block mask; 0 switches it off, 1 suits most."""
    link_tokens: int = 0
    """Trainable tokens that end each passage's block (KVLink, arXiv 2502.16002, uses 5)."""
    sink_tokens: int = 0
    """Trainable tokens that open each passage's block, to take up the attention that a first token attracts."""
    train: Trainable = "all"
    """"tokens" freezes everything but the embeddings of the link and sink tokens."""
    precision: Precision = "auto"
    """Of the forward pass (autocast); weights and optimiser stay in float32. auto: bf16 on GPUs and on processors with
    instructions for it."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: a third slower, memory for one layer's activations only."""
    attention: AttentionKind = "auto"
    """"flex" (CUDA) skips what the block mask hides; "dense" runs everywhere; "auto" takes the first that can."""
    dev: Path | None = None
    """Question rows to measure on; None: rows held out of ``data``, or nothing with ``questions`` above 1."""
    dev_rows: int = 64
    """Samples to measure on; at most a tenth of ``data`` is held out for them. 0 measures nothing."""
    eval_steps: int = 200
    """Steps between two measurements; the start and the end are always measured."""
    checkpoint_steps: int = 100
    """Steps between two checkpoints: what a kill costs at most."""
    threads: int = 1
    """Micro-batches computed at a time on a CPU, each by one core; 1: one, by all cores. As many as there are cores is
    faster where other processes want them too, and takes memory for as many."""
    tensorboard: bool = False
    """Write TensorBoard files to OUT.run."""

    undecided: ClassVar[frozenset[str]] = frozenset(
        {"model", "data", "out", "name", "template_file", "micro_batch", "exclude", "gradient_checkpointing"}
        | {"attention", "dev", "eval_steps", "checkpoint_steps", "threads", "device", "tensorboard"}
    )

    def __post_init__(self) -> None:
        self.require_least(
            1,
            *("steps", "batch_size", "micro_batch", "min_passages", "max_tokens", "questions", "threads"),
            *("eval_steps", "checkpoint_steps"),
        )
        self.require(self.max_passages >= self.min_passages, "max_passages", "must not be below min_passages")
        self.require_share("refusal_share")
        self.require_positive("learning_rate")
        self.require_least(0, "warmup_steps", "distillation", "link_tokens", "sink_tokens", "dev_rows", "lora_rank")
        self.require_least(8, "passage_tokens")
        self.require(
            not self.distillation or self.masks == "both", "distillation", "needs both masks: the full one teaches"
        )
        self.require(self.threads == 1 or self.device == "cpu", "threads", "is for a CPU")
        self.require(
            self.questions > 1 or not (self.shares or self.exclude), "questions", "is 1: no shares, nothing to exclude"
        )
        self.require(
            not self.shares or (len(self.shares) == len(self.data) and min(self.shares) > 0),
            "shares",
            "must be positive, one for each file of data",
        )
        self.require(
            not (self.lora_rank and self.train == "tokens"), "lora_rank", "trains an adapter, not the tokens alone"
        )
        self.require(
            self.train == "all" or self.link_tokens + self.sink_tokens > 0,
            "train",
            "'tokens' needs link_tokens or sink_tokens to train",
        )
