"""What decides a run of ``blockrag adapt refrag``."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from blockrag.errors import SetupError
from blockrag.modeling.files import DEFAULT_BUNDLE, file_sha256
from blockrag.modeling.refrag.record import POOLINGS, Alignment, Pooling
from blockrag.training.configuring import Precision, StagedConfig

Stage = Literal["reconstruction", "pretrain", "mixed", "tune"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SMALL_ENCODER = "small"
"""The chunk encoder that needs no download: a two-layer BERT over the decoder's own tokens."""

_OWN_LAYERS = re.compile(r"decoder:([1-9][0-9]{0,2})")


def _only(default: Any, *stages: Stage) -> Any:
    """A field that means something in these stages alone."""
    return field(default=default, metadata={"stages": stages})


@dataclass(frozen=True, kw_only=True)
class RefragConfig(StagedConfig):
    """One stage. Each stage takes the bundle of the one before and writes one of its own."""

    stage: Stage
    bundle: Path = DEFAULT_BUNDLE
    """The bundle to start from; without chunk compression, the stage makes a new chunk encoder and projector."""
    data: tuple[Path, ...] = _only((), "tune")
    """JSONL(.gz) files of question rows, as ``adapt block`` reads them."""
    name: str = ""
    """The bundle's name; default: that of the bundle it starts from."""
    chunk_tokens: int | None = None
    """Tokens of a chunk (k); None: the bundle's."""
    encoder: str = ""
    """``small``, ``decoder:N`` for the decoder's own first N layers, or the directory of a Hugging Face encoder;
    default: the bundle's, or ``small``."""
    pooling: Pooling | None = None
    """How a chunk's states become one vector; None: the bundle's, or ``mean``."""
    tokens_per_step: int = 5000
    """Context and target tokens of a step, over all workers, about."""
    learning_rate: float = 2e-3
    """Peak, of chunk encoder and projector."""
    decoder_learning_rate: float = 4e-4
    """Peak, of the decoder: it has learnt already. 2e-5 suits billions of parameters."""
    warmup_steps: int = 50
    """Steps until the learning rate is reached."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """``muon`` for matrices, with AdamW for the rest, learns faster in small models; several workers need ``adamw``."""
    curriculum: bool = _only(True, "reconstruction")
    """Reconstruction from one chunk to many; without it, all lengths are as likely from the start (an ablation)."""
    train_decoder: bool | None = None
    """Whether the decoder learns too; None: in every stage but reconstruction. Trained in reconstruction, a small
    decoder reconstructs more; frozen in the others, encoder and projector learn to serve it and it unlearns nothing."""
    lora_rank: int = 0
    """Rank of a low-rank adapter (LoRA) beside every linear layer of the decoder, which alone is trained of it; 0: all
    of its weights are. On a bundle with a base it is joined with the adapter that is there, whose rank grows by it;
    into weights of the bundle's own it is merged."""
    max_passages: int = 10
    """Most passages of a context of text or question rows."""
    text_share: float = _only(0.2, "tune")
    """Share of next-paragraph samples among a tuning's tokens, where it has texts: what was learnt there is kept."""
    targets: int = _only(4, "pretrain", "mixed", "tune")
    """Most passages of a text's context that are targets too, each behind those before it."""
    compressed_share: float = _only(0.3, "mixed", "tune")
    """Share of a text's compositions with every chunk compressed."""
    distillation: float = _only(0.0, "pretrain", "mixed", "tune")
    """Share, in the loss of a text's tokens, of the divergence from what the same decoder predicts after the
    uncompressed passages (arXiv 1503.02531); the rest is the next token itself."""
    expanded_share: float = _only(0.2, "mixed", "tune")
    """Share of compositions with every chunk expanded."""
    full_share: float = _only(0.12, "mixed", "tune")
    """Share of samples read whole under the full mask: the reader keeps serving that mode."""
    average_with: Path | None = None
    """A bundle whose decoder's weights the learnt ones are averaged with at the end (arXiv 2109.01903): what was
    unlearnt on the way comes back, and most of what was learnt stays."""
    learnt_share: float = 0.5
    """Weight of the learnt decoder in that average."""
    precision: Precision = "auto"
    """Of the forward pass (autocast); weights and optimiser stay in float32. auto: bf16 on GPUs and on processors with
    instructions for it."""
    parts: int = 2
    """Parts that a step is cut into: shared out to the workers, and on a CPU to threads of one core each. More parts
    take less memory."""
    dev_samples: int = 64
    """Held-out samples to measure on."""
    eval_steps: int = 200
    """Steps between two measurements; start and end are always measured."""
    checkpoint_steps: int = 100
    """Steps between two checkpoints: what a kill costs at most."""

    undecided: ClassVar[frozenset[str]] = frozenset(
        {"out", "bundle", "text", "data", "name", "average_with", "eval_steps", "checkpoint_steps", "device"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.stage in STAGES, "stage", f"must be one of {', '.join(STAGES)}")
        self.require(self.pooling is None or self.pooling in POOLINGS, "pooling", f"must be {' or '.join(POOLINGS)}")
        self.require_positive("learning_rate", "decoder_learning_rate")
        self.require_least(1, "tokens_per_step", "max_passages", "targets", "parts", "eval_steps", "checkpoint_steps")
        self.require_least(1, "chunk_tokens")
        self.require_least(0, "warmup_steps", "dev_samples", "lora_rank")
        self.require_share(
            *("text_share", "compressed_share", "expanded_share", "full_share", "learnt_share", "distillation")
        )
        self.require(
            self.average_with is None or self.decoder_learns, "average_with", "the stage does not change the decoder"
        )
        self.require(
            self.lora_rank == 0 or (self.decoder_learns and self.average_with is None),
            "lora_rank",
            "needs a decoder that learns and is averaged with no other",
        )
        self.require(
            self.distillation == 0 or self.stage != "reconstruction",
            "distillation",
            "reconstruction has no other prompt",
        )
        if self.stage in ("reconstruction", "pretrain", "mixed") and not self.text:
            raise SetupError(f"stage {self.stage}: needs texts (--text)")
        if self.stage == "tune" and not self.data:
            raise SetupError(f"stage {self.stage}: needs questions (--data)")

    @property
    def decoder_learns(self) -> bool:
        """Whether the stage changes the decoder."""
        return self.stage != "reconstruction" if self.train_decoder is None else self.train_decoder

    @property
    def uncompressed_shares(self) -> tuple[float, float]:
        """``expanded_share`` and ``full_share``; none where such samples would teach nothing, the decoder frozen."""
        return (self.expanded_share, self.full_share) if self.decoder_learns else (0.0, 0.0)

    @property
    def alignment(self) -> Alignment:
        """How a new chunk encoder reads chunks."""
        if self.own_layers:
            return "decoder"
        return "tokens" if self.encoder in ("", SMALL_ENCODER) else "text"

    @property
    def own_layers(self) -> int:
        """How many of the decoder's own layers are the new chunk encoder; 0: it is another one."""
        found = _OWN_LAYERS.fullmatch(self.encoder)
        return int(found[1]) if found else 0


POLICY_HEAD = 32
"""Width of a policy's head."""


@dataclass(frozen=True)
class PpoSettings:
    """What decides an update."""

    draws: int = 8
    """Expansions drawn for each prompt; the more, the less noise in an advantage."""
    fractions: tuple[float, float] = (0.03, 0.5)
    """Smallest and largest share of a prompt's chunks to expand, drawn anew for each prompt; as many between 0.05 and
    0.1 as between 0.25 and 0.5."""
    clip: float = 0.2
    """How far an update may move the likelihood of a draw."""
    epochs: int = 2
    """Updates from the same draws; the clipping is for those after the first."""
    least_spread: float = 0.005
    """Nats added to a group's standard deviation: what differs less is rounding. The next paragraph's loss moves by
    about 0.01 with the choice of chunks, an answer's by 1."""

    def __post_init__(self) -> None:
        low, high = self.fractions
        if not 0 < low <= high <= 1:
            raise SetupError(f"fractions {self.fractions}: must rise within (0, 1]")
        if self.draws < 2 or self.epochs < 1 or self.clip <= 0 or self.least_spread <= 0:
            raise SetupError("an update needs at least two draws, one epoch, and positive clip and least_spread")


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig(StagedConfig):
    """A policy's training."""

    bundle: Path = DEFAULT_BUNDLE
    """A bundle with chunk compression; it is not changed."""
    policy: Literal["query", "blind"] = "query"
    """One that sees the question, or the paper's."""
    name: str = ""
    """Name of the policy in the bundle; default: query or blind. One of the same name is replaced."""
    data: tuple[Path, ...] = ()
    """JSONL(.gz) files of question rows, as ``adapt block`` reads them."""
    text_share: float | None = None
    """Share of contexts whose target is the next paragraph; None: 0.6, with the question in sight 0.2."""
    text_reward: Literal["label", "divergence"] = "label"
    """What a text's choice is rewarded by: the target's own likelihood, as published, or how little the predictions
    diverge from those after the uncompressed passages, which says the same with less noise."""
    policy_width: int = 64
    """Of the policy; it has a head per 32 and twice as many units inside its feed-forward layers. 64 rates 320 chunks
    in 1.2 ms on one core, 96 in 1.6."""
    start_from: Path | None = None
    """A policy's file to start from, after the parts it was trained with were tuned further; None: random weights."""
    contexts: int = 4
    """Contexts of a step: reading their blocks is what a step costs most, next to the draws."""
    max_passages: int = 10
    """Most passages of a context."""
    ppo: PpoSettings = field(default_factory=PpoSettings)
    imitation: float | None = None
    """Share of the budget in which the policy first learns to draw the chunks that hold the answers, without reading
    anything; None: 0.25 for one that sees the question, else 0, as published."""
    imitation_contexts: int = 4
    """Contexts of such a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate, after a warm-up; it falls with a cosine."""
    warmup_steps: int = 10
    """Steps until the learning rate is reached."""
    dev_samples: int = 48
    """Held-out questions, and as many texts, to measure on."""
    eval_steps: int = 100
    """Steps between two measurements; start and end are always measured."""
    checkpoint_steps: int = 25
    """Steps between two checkpoints: what a kill costs at most."""
    precision: Precision = "auto"
    """Of the frozen reader; the policy is in float32. auto: bf16 where it is fast, as in the other stages."""
    threads: int = 2
    """On a CPU: threads, each reading contexts of its own with one core."""

    undecided: ClassVar[frozenset[str]] = frozenset(
        {"out", "bundle", "text", "data", "name", "start_from", "eval_steps", "checkpoint_steps", "threads", "device"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least(1, "contexts", "max_passages", "eval_steps", "checkpoint_steps", "threads")
        self.require_positive("learning_rate")
        self.require_share("text_share")
        width = self.policy_width
        right = width >= POLICY_HEAD and width % POLICY_HEAD == 0
        self.require(right, "policy_width", f"must be a multiple of {POLICY_HEAD}")
        self.require(self.text_reward in ("label", "divergence"), "text_reward", "must be label or divergence")
        imitates = 0 <= self.chosen_imitation < 1 and self.imitation_contexts >= 1
        self.require(imitates, "imitation", "must be from 0 to below 1, with at least one context")
        if not (self.text or self.data):
            raise SetupError("a policy needs questions (--data), texts (--text) or both")

    @property
    def query(self) -> bool:
        """Whether the policy sees the question."""
        return self.policy == "query"

    @property
    def policy_name(self) -> str:
        return self.name or self.policy

    @property
    def chosen_text_share(self) -> float:
        if self.text_share is not None:
            return self.text_share
        return 0.2 if self.query else 0.6

    @property
    def chosen_imitation(self) -> float:
        if self.imitation is not None:
            return self.imitation
        return 0.25 if self.query else 0.0

    def recipe(self) -> dict[str, Any]:
        """The values that decide the result, beside bundle and data."""
        start = file_sha256(self.start_from) if self.start_from is not None else ""
        chosen = {"imitation": self.chosen_imitation, "text_share": self.chosen_text_share, "ppo": asdict(self.ppo)}
        return {**super().recipe(), **chosen, "start": start}
