"""What decides a reader's training: its size, budget, data and machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import LlamaConfig

from blockrag.modeling.template import READER_TEMPLATE, PromptTemplate
from blockrag.training.mixture import Mixture
from blockrag.training.packing import Weights
from blockrag.training.tokenizer import BEGIN_ID, END_ID, PAD_ID

STRETCHED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 64.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
"""Rotations that tell positions apart within a sentence or two, and hardly at all beyond.

A reader finds a passage by its words, wherever it stands. With the usual frequencies three of a small head's sixteen
pairs keep their direction over a prompt of ten passages; here wavelengths above 512 tokens are 64 times as long, and
eight do. Wavelengths below 128 stay as they are, for what stands beside what.
"""


@dataclass(frozen=True)
class ModelShape:
    """Size of the Llama-architecture decoder; the default has 6.5 million parameters."""

    vocab_size: int = 8192
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 704
    max_tokens: int = 16384

    def config(self) -> LlamaConfig:
        """The transformers configuration; input and output embeddings are tied."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            max_position_embeddings=self.max_tokens,
            rope_parameters=dict(STRETCHED_ROPE),
            tie_word_embeddings=True,
            pad_token_id=PAD_ID,
            bos_token_id=BEGIN_ID,
            eos_token_id=END_ID,
        )


SHAPES = {
    "6m": ModelShape(),
    "28m": ModelShape(vocab_size=16384, width=512, layers=7, heads=8, kv_heads=4, head_dim=64, intermediate=1344),
}
"""Sizes by name: one that two CPU cores can train and serve, and one for a GPU."""


@dataclass(frozen=True)
class ReaderTrainingConfig:
    """Everything that decides what a training run computes."""

    data_dir: Path
    out_dir: Path
    """Holds the tokenizer, the checkpoint and, at the end, the bundle. A run continues from the checkpoint there."""
    minutes: float | None = None
    """Time budget of the training itself; the learning rate reaches its end with it. Pauses do not count."""
    steps: int | None = None
    """Budget in steps, for runs that must be reproducible. Exactly one of ``minutes`` and ``steps`` is given."""
    start_from: Path | None = None
    """A bundle whose weights and tokenizer the run starts from; ``shape`` and ``tokenizer_articles`` then do not
    count, and contexts are long from the beginning."""
    stretch_rope: bool = False
    """Give the bundle that the run starts from the rotations of new readers (``STRETCHED_ROPE``)."""
    shape: ModelShape = field(default_factory=ModelShape)
    mixture: Mixture = field(default_factory=Mixture)
    weights: Weights = field(default_factory=Weights)
    template: PromptTemplate = READER_TEMPLATE
    tokens_per_step: int = 5000
    """Larger is smoother, smaller learns more per minute on a slow machine. Rows are added up to about this many."""
    learning_rate: float = 2e-3
    """Peak. Falls with the width: try half of it for a reader twice as wide."""
    warmup_steps: int = 100
    optimizer: str = "muon"
    """``muon`` for the matrices inside the layers with ``adamw`` for the rest, or ``adamw`` for all."""
    evidence: float = 0.5
    """Weight of the loss that shows the attention where an answer stands, beside the answers' 1; 0: none."""
    passage_share: float = 0.5
    """Share of the passage tokens, drawn anew each step, that the loss looks at; their weight rises to make up."""
    checkpoint_steps: int = 200
    probe_contexts: int = 128
    """Held-out questions that a checkpoint is measured on."""
    tokenizer_articles: int = 60_000
    parts: int = 4
    """Parts a step is cut into. On a CPU they are shared out to ``threads`` threads; 1 suits a GPU."""
    threads: int = 2
    """Threads, each working on one part with one core: threads that meet once a step do not hold each other up on a
    busy machine as threads that share every matrix product do."""
    feeders: int = 0
    """Processes that make the next steps' batches; 0: the training makes them itself. A GPU wants as many as there are
    cores."""
    masks: Literal["both", "full"] = "both"
    """``full`` never shows the block mask: for the ablation of a model that was not tuned for it."""
    related_words: Path | None = None
    """Directory of a sentence encoder; questions in other words take related words from its embeddings."""
    seed: int = 0
    device: str = "cpu"
